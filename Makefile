# SPDX-License-Identifier: GPL-2.0
#
# Installs pinbuf on the machine at hand. (Kbuild reads the file Kbuild, not this one.)
#
#   make                  build driver/pinbuf.ko against $(KDIR)
#   make install          module, header, udev rule, autoload; as root
#   make install-user     the command `pinbuf`, the shim and the C library; as root
#   make dkms-install     instead of the module: rebuild it for each new kernel
#   make install-man      manual pages and completions of the shells; as root
#   make uninstall        take all of that away

RELEASE ?= $(shell uname -r)
# Debian's headers lack what Rust modules need; `packaging/kernel-tree` makes a tree that has it.
KDIR ?= $(firstword $(wildcard /var/lib/pinbuf/trees/$(RELEASE)) /lib/modules/$(RELEASE)/build)
# How that tree wants to be called, where kernel-tree made it.
-include $(KDIR)/pinbuf.mk
DESTDIR ?=
PREFIX ?= /usr
LIBDIR ?= $(PREFIX)/lib
CARGO ?= cargo
CARGO_FLAGS ?= --locked
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
# The number in the C library's SONAME, which changes when programs have to be compiled again.
SONAME = $(shell sed -n 's/.*soname,libpinbuf\.so\.\([0-9]*\).*/\1/p' shim/capi/build.rs)
UNIT := $(DESTDIR)/usr/lib/systemd/system/pinbuf.service
MODULES := $(DESTDIR)/lib/modules/$(RELEASE)
DKMS_SOURCE := $(DESTDIR)/usr/src/pinbuf-$(VERSION)

module: driver/pinbuf.ko
	@:

driver/pinbuf.ko: $(wildcard driver/*.rs driver/*/*.rs driver/*.[ch] uapi/src/*.rs) Kbuild driver/Kbuild
	$(MAKE) -C $(KDIR) $(KFLAGS) M=$(CURDIR) modules

install: module install-files
	install -D -m 644 driver/pinbuf.ko $(MODULES)/updates/pinbuf.ko
	$(if $(DESTDIR),,depmod -a $(RELEASE))
	@echo "installed; load it with 'modprobe pinbuf' (at every start from now on it loads by itself)"

install-files:
	install -D -m 644 uapi/pinbuf.h $(DESTDIR)$(PREFIX)/include/linux/pinbuf.h
	install -D -m 644 packaging/60-pinbuf.rules $(DESTDIR)/usr/lib/udev/rules.d/60-pinbuf.rules
	install -D -m 644 packaging/apparmor-libvirt $(DESTDIR)/etc/apparmor.d/abstractions/libvirt-qemu.d/pinbuf
	install -D -m 644 packaging/pinbuf.service $(UNIT)
	$(if $(DESTDIR),,-systemctl enable pinbuf.service)
	$(if $(DESTDIR),,-udevadm control --reload)
	$(if $(DESTDIR),,-test ! -e /dev/pinbuf || udevadm trigger /dev/pinbuf)

build-user:
	$(CARGO) build --release $(CARGO_FLAGS) --package pinbuf-cli --package pinbuf-preload --package pinbuf-capi \
		--lib --bins --example manual

TARGET = $(or $(CARGO_TARGET_DIR),target)/release
install-user: build-user
	install -D -m 755 $(TARGET)/pinbuf $(DESTDIR)$(PREFIX)/bin/pinbuf
	install -D -m 644 $(TARGET)/libudmabuf_shim.so $(DESTDIR)$(PREFIX)/lib/pinbuf/libudmabuf_shim.so
	install -D -m 644 $(TARGET)/libpinbuf_c.so $(DESTDIR)$(LIBDIR)/libpinbuf.so.$(VERSION)
	ln -sf libpinbuf.so.$(VERSION) $(DESTDIR)$(LIBDIR)/libpinbuf.so.$(SONAME)
	ln -sf libpinbuf.so.$(SONAME) $(DESTDIR)$(LIBDIR)/libpinbuf.so
	install -D -m 644 $(TARGET)/libpinbuf_c.a $(DESTDIR)$(LIBDIR)/libpinbuf.a
	install -D -m 644 shim/capi/include/libpinbuf.h $(DESTDIR)$(PREFIX)/include/libpinbuf.h
	install -d $(DESTDIR)$(LIBDIR)/pkgconfig
	sed 's|@PREFIX@|$(PREFIX)|; s|@LIBDIR@|$(LIBDIR)|; s|@VERSION@|$(VERSION)|' packaging/libpinbuf.pc \
		>$(DESTDIR)$(LIBDIR)/pkgconfig/libpinbuf.pc
	$(if $(DESTDIR),,ldconfig)

# Pages of the command and completions come from its command line, the others are in docs/man.
man: build-user
	$(TARGET)/examples/manual build/man
	cp docs/man/*.[0-9] build/man/

install-man: man
	for section in 1 3 4 8; do \
		install -d $(DESTDIR)$(PREFIX)/share/man/man$$section && \
		install -m 644 build/man/*.$$section $(DESTDIR)$(PREFIX)/share/man/man$$section/ || exit; \
	done
	install -D -m 644 build/man/pinbuf.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/pinbuf
	install -D -m 644 build/man/_pinbuf $(DESTDIR)$(PREFIX)/share/zsh/vendor-completions/_pinbuf
	install -D -m 644 build/man/pinbuf.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/pinbuf.fish

dkms-install: install-files
	install -d $(DKMS_SOURCE)
	cp -r Makefile Cargo.toml Kbuild driver uapi packaging $(DKMS_SOURCE)/
	sed 's/@VERSION@/$(VERSION)/' packaging/dkms.conf >$(DKMS_SOURCE)/dkms.conf
	$(if $(DESTDIR),,dkms add pinbuf/$(VERSION))
	$(if $(DESTDIR),,dkms install pinbuf/$(VERSION) -k $(RELEASE))

uninstall:
	-dkms remove pinbuf/$(VERSION) --all 2>/dev/null
	rm -rf $(DKMS_SOURCE)
	rm -f $(MODULES)/updates/pinbuf.ko $(DESTDIR)$(PREFIX)/include/linux/pinbuf.h
	$(if $(DESTDIR),,-systemctl disable pinbuf.service)
	rm -f $(DESTDIR)/usr/lib/udev/rules.d/60-pinbuf.rules $(UNIT)
	rm -f $(DESTDIR)/etc/apparmor.d/abstractions/libvirt-qemu.d/pinbuf
	rm -f $(DESTDIR)$(PREFIX)/bin/pinbuf $(DESTDIR)$(PREFIX)/lib/pinbuf/libudmabuf_shim.so
	rm -f $(DESTDIR)$(LIBDIR)/libpinbuf.* $(DESTDIR)$(LIBDIR)/pkgconfig/libpinbuf.pc $(DESTDIR)$(PREFIX)/include/libpinbuf.h
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/share/man/,man1/pinbuf.1 man1/pinbuf-*.1 man3/libpinbuf.3 man4/pinbuf.4 man8/libudmabuf_shim.8)
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/share/,bash-completion/completions/pinbuf zsh/vendor-completions/_pinbuf fish/vendor_completions.d/pinbuf.fish)
	$(if $(DESTDIR),,depmod -a $(RELEASE))

clean:
	$(MAKE) -C $(KDIR) $(KFLAGS) M=$(CURDIR) clean

.PHONY: module install install-files build-user install-user man install-man dkms-install uninstall clean
