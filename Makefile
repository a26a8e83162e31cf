# SPDX-License-Identifier: GPL-2.0
#
# Installs pinbuf on the machine at hand. (Kbuild reads the file Kbuild, not this one.)
#
#   make                  build driver/pinbuf.ko against $(KDIR)
#   make install          module, header, udev rule, autoload; as root
#   make install-user     the command `pinbuf`, the shim and the library; as root
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
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
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
	install -D -m 644 packaging/modules-load.conf $(DESTDIR)/usr/lib/modules-load.d/pinbuf.conf
	$(if $(DESTDIR),,-udevadm control --reload)
	$(if $(DESTDIR),,-test ! -e /dev/pinbuf || udevadm trigger /dev/pinbuf)

install-user:
	cargo build --release --workspace --exclude pinbuf-guest --exclude pinbuf-guest-init
	install -D -m 755 target/release/pinbuf $(DESTDIR)$(PREFIX)/bin/pinbuf
	install -D -m 644 target/release/libudmabuf_shim.so $(DESTDIR)$(PREFIX)/lib/pinbuf/libudmabuf_shim.so

# Pages of the command and completions come from its command line, the others are in docs/man.
man:
	cargo run --quiet --package pinbuf-cli --example manual -- build/man
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
	rm -f $(DESTDIR)/usr/lib/udev/rules.d/60-pinbuf.rules $(DESTDIR)/usr/lib/modules-load.d/pinbuf.conf
	rm -f $(DESTDIR)$(PREFIX)/bin/pinbuf $(DESTDIR)$(PREFIX)/lib/pinbuf/libudmabuf_shim.so
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/share/man/,man1/pinbuf.1 man1/pinbuf-*.1 man3/libpinbuf.3 man4/pinbuf.4 man8/libudmabuf_shim.8)
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/share/,bash-completion/completions/pinbuf zsh/vendor-completions/_pinbuf fish/vendor_completions.d/pinbuf.fish)
	$(if $(DESTDIR),,depmod -a $(RELEASE))

clean:
	$(MAKE) -C $(KDIR) $(KFLAGS) M=$(CURDIR) clean

.PHONY: module install install-files install-user man install-man dkms-install uninstall clean
