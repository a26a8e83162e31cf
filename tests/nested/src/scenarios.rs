// SPDX-License-Identifier: MIT OR Apache-2.0

//! The scenarios: each starts its own virtual machines.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use serde_json::json;

use crate::discards::balloon;
use crate::evidence;
use crate::gl::{
    dbus_descriptor, dbus_without_blob, egl_headless, gtk_gl_off, gtk_gl_on,
    udmabuf_dbus_without_blob,
};
use crate::honest::honest;
use crate::libvirt::confined_by_libvirt;
use crate::machine::{refusal, Backend, Machine, Setup, User};
use crate::migrate::{
    downtime_few_pieces, downtime_many_pieces, postcopy_broken_in_create, postcopy_huge,
    postcopy_paused, postcopy_plain, postcopy_user, precopy, preempt_few_pieces,
    preempt_many_pieces, preempt_of_a_copy, udmabuf_postcopy_huge, udmabuf_postcopy_plain,
    udmabuf_precopy,
};
use crate::protocol::{Answer, Request};
use crate::vfio::{self, Nvme};
use crate::vnc::Vnc;
use crate::zones;

/// A scenario.
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// Which group it belongs to: `run --group`.
    pub group: &'static str,
    /// What it does.
    pub run: fn() -> Result<()>,
}

macro_rules! scenarios {
    ($($group:literal: $($name:ident),* $(,)?;)*) => {
        /// All of them.
        pub const ALL: &[Scenario] = &[
            $($(Scenario { name: stringify!($name), group: $group, run: $name }),*),*
        ];
    };
}

scenarios! {
    "screen": refused_without, plain, huge, vnc_client;
    "large": uhd_4k, uhd_8k, fragmented;
    "vfio": vfio_plain, vfio_huge, vfio_hotplug_and_reset, vfio_memlock, two_machines;
    "levels": two_levels;
    "udmabuf": udmabuf_refuses_8k, udmabuf_stale_fragmented, udmabuf_dbus_without_blob;
    "gl": dbus_descriptor, dbus_without_blob, egl_headless, gtk_gl_on, gtk_gl_off;
    "libvirt": confined_by_libvirt;
    "migrate": precopy, postcopy_plain, postcopy_huge, postcopy_paused, postcopy_broken_in_create, postcopy_user,
        downtime_few_pieces, downtime_many_pieces, preempt_few_pieces, preempt_many_pieces, preempt_of_a_copy,
        udmabuf_precopy, udmabuf_postcopy_plain, udmabuf_postcopy_huge;
    "discards": balloon;
    "honest": honest;
    "cma": buffers_then_vfio_cma;
    "zones": buffers_then_vfio_movable, vfio_then_buffers_movable, offline_under_screen;
}

/// Prints a remark.
pub fn note(text: &str) {
    for line in text.lines() {
        println!("# {line}");
    }
}

/// Prints how long something took.
pub fn timed<T>(what: &str, action: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let result = action().with_context(|| what.to_owned())?;
    note(&format!("{what}: {:.1} s", start.elapsed().as_secs_f64()));
    Ok(result)
}

/// Makes 2 MiB pages available.
pub fn huge_pages(mib: u64) -> Result<()> {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    fs::write(path, (mib / 2).to_string())?;
    let got: u64 = fs::read_to_string(path)?.trim().parse()?;
    ensure!(got == mib / 2, "only {got} huge pages could be made");
    Ok(())
}

/// Starts a machine and lets its guest show a dumb buffer.
pub fn start(setup: &Setup) -> Result<Machine> {
    let mut machine = timed("QEMU starts and its guest is ready", || {
        Machine::start(setup)
    })?;
    show(&mut machine, setup)?;
    Ok(machine)
}

pub fn show(machine: &mut Machine, setup: &Setup) -> Result<()> {
    let shown = machine.show(&Request::Show)?;
    ensure!(
        (shown.width, shown.height) == setup.screen,
        "the guest chose {}x{}",
        shown.width,
        shown.height
    );
    Ok(())
}

/// Frames, each compared; where the buffers came from; figures.
fn check_screen(machine: &mut Machine, frames: std::ops::Range<u32>) -> Result<()> {
    let count = frames.len();
    timed(
        &format!("{count} frames drawn, dumped and compared"),
        || machine.frames(frames),
    )?;
    let screen = machine.screen()?;
    for (buffer, info) in machine.buffers()? {
        note(&format!(
            "fdinfo of QEMU's fd {}: {} of {} bytes; PINBUF_INFO: {} extents, {} pins, {} pages \
             charged to {}",
            buffer.fd,
            buffer.exporter,
            buffer.size,
            info.extents,
            info.pins,
            info.charged_pages,
            info.charge
        ));
    }
    note(&format!(
        "screen {}x{}; the shim's calls (items, pieces): {:?}",
        screen.width,
        screen.height,
        machine.items()?
    ));
    Ok(())
}

fn refused_without() -> Result<()> {
    evidence::no_udmabuf()?;
    let setup = Setup {
        pinbuf: false,
        ..Setup::new("refused")
    };
    let said = refusal(&setup)?;
    note(&format!(
        "QEMU's message without pinbuf: {}",
        said.trim_end()
    ));
    ensure!(said.contains("udmabuf"), "that is about something else");
    Ok(())
}

fn plain() -> Result<()> {
    evidence::no_udmabuf()?;
    // With the kernel's console on the screen first: another buffer.
    let setup = Setup {
        console: true,
        ..Setup::new("plain")
    };
    let mut machine = start(&setup)?;
    check_screen(&mut machine, 1..5)?;
    // Memory that QEMU shares with its guest is pinned page by page: 4 KiB each.
    let info = machine.screen_buffer()?;
    ensure!(info.pins == info.pages, "{info:?}");
    evidence::no_udmabuf()?;
    machine.quit()
}

fn huge() -> Result<()> {
    evidence::no_udmabuf()?;
    let setup = Setup {
        backend: Backend::Huge,
        ..Setup::new("huge")
    };
    huge_pages(setup.memory)?;
    let mut machine = start(&setup)?;
    check_screen(&mut machine, 1..5)?;
    // One pin for each huge page and piece, and far fewer than pages.
    let info = machine.screen_buffer()?;
    ensure!(info.pins < info.pages / 4, "{info:?}");
    evidence::no_udmabuf()?;
    machine.quit()?;
    huge_pages(0)
}

fn vnc_client() -> Result<()> {
    evidence::no_udmabuf()?;
    let mut setup = Setup::new("vnc");
    let socket = "/tmp/nested/vnc/vnc-socket";
    setup.display = vec![format!("vnc=unix:{socket}")];
    let mut machine = start(&setup)?;
    let mut expected = machine.draw(1)?;
    let mut client = Vnc::connect(socket.as_ref())?;
    for frame in 2..6 {
        let start = Instant::now();
        // The server looks for changes from time to time.
        loop {
            let (wrong, first) = client.picture()?.wrong(expected)?;
            if wrong == 0 {
                break;
            }
            let patience = start.elapsed() < Duration::from_secs(60);
            ensure!(patience, "VNC: {wrong} pixels stay wrong; {first}");
        }
        note(&format!(
            "VNC: every pixel of frame {} right after {:.1} s",
            expected.frame,
            start.elapsed().as_secs_f64()
        ));
        expected = machine.draw(frame)?;
    }
    machine.buffers()?;
    machine.quit()
}

fn large(name: &str, screen: (u32, u32)) -> Result<()> {
    evidence::no_udmabuf()?;
    let setup = Setup {
        screen,
        memory: 768,
        ..Setup::new(name)
    };
    let mut machine = start(&setup)?;
    check_screen(&mut machine, 1..3)?;
    machine.quit()
}

fn uhd_4k() -> Result<()> {
    large("4k", (3840, 2160))
}

fn uhd_8k() -> Result<()> {
    large("8k", (7680, 4320))
}

/// Fragments the guest's memory, and lets the guest show another buffer, made of the pieces.
pub fn show_fragmented(machine: &mut Machine, setup: &Setup) -> Result<()> {
    match machine.ask(&Request::Fragment(128))? {
        Answer::Freed(pages) => note(&format!("{pages} pages of the guest freed one by one")),
        other => bail!("{other:?}"),
    }
    let shown = machine.show(&Request::ShowAnother)?;
    ensure!((shown.width, shown.height) == setup.screen, "{shown:?}");
    Ok(())
}

fn fragmented() -> Result<()> {
    evidence::no_udmabuf()?;
    let setup = Setup::new("fragmented");
    let mut machine = start(&setup)?;
    check_screen(&mut machine, 1..2)?;
    show_fragmented(&mut machine, &setup)?;
    check_screen(&mut machine, 2..5)?;
    let items = machine.items()?;
    let most = items.iter().map(|&(items, _)| items).max().unwrap_or(0);
    ensure!(most > 1024, "QEMU named at most {most} items: {items:?}");
    machine.quit()
}

/// A process of the inner guest exports its own memory by the inner pinbuf, the inner virtio-gpu
/// shows it, and QEMU reads it through the outer pinbuf.
fn two_levels() -> Result<()> {
    evidence::no_udmabuf()?;
    let setup = Setup {
        modules: vec!["pinbuf"],
        ..Setup::new("levels")
    };
    let mut machine = timed("QEMU starts and its guest is ready", || {
        Machine::start(&setup)
    })?;
    machine.show(&Request::ShowExported)?;
    check_screen(&mut machine, 1..4)?;
    machine.quit()
}

/// Frames while the guest reads and writes its disk.
fn check_disk_and_screen(machine: &mut Machine, frames: std::ops::Range<u32>) -> Result<()> {
    machine.disk_start(vfio::PLAN)?;
    check_screen(machine, frames)?;
    let (read, written) = timed("the disk's first pass ends", || machine.disk_stop())?;
    note(&format!(
        "meanwhile {} KiB read and right, {} KiB written and read back",
        read >> 10,
        written >> 10
    ));
    Ok(())
}

/// All of the guest's memory is locked, once, for vfio.
fn check_locked(machine: &Machine, setup: &Setup) -> Result<()> {
    let process = machine.process();
    let locked = evidence::status_kib(process, "VmLck")?;
    let pinned = evidence::status_kib(process, "VmPin")?;
    let pins = u64::try_from(evidence::pins()?)?;
    note(&format!(
        "VmLck {locked} KiB (vfio), VmPin {pinned} KiB (pinbuf), pins {pins}"
    ));
    let memory = setup.memory << 10;
    // Besides memory, QEMU gives vfio the firmware and the devices' ROMs.
    ensure!(
        (memory..memory + (32 << 10)).contains(&locked),
        "{locked} KiB are locked for {memory} KiB of memory"
    );
    if setup.backend == Backend::Memfd {
        // Each of the two pins page by page, and there are no other pins.
        let buffers = machine.buffers()?;
        let own: u64 = buffers.iter().map(|(_, info)| info.pins).sum();
        ensure!(
            pins == own + locked / 4,
            "{pins} pins, {own} of them pinbuf's"
        );
    }
    Ok(())
}

fn vfio_scenario(setup: Setup) -> Result<()> {
    evidence::no_udmabuf()?;
    let nvme = Nvme::find()?;
    timed("the nvme is filled and handed to vfio", || nvme.prepare())?;
    let setup = Setup {
        vfio: Some(nvme.address.clone()),
        ..setup
    };
    let mut machine = start(&setup)?;
    check_disk_and_screen(&mut machine, 1..5)?;
    check_locked(&machine, &setup)?;
    machine.quit()?;
    timed("the nvme is taken back and compared", || nvme.take_back())
}

fn vfio_plain() -> Result<()> {
    vfio_scenario(Setup::new("vfio"))
}

fn vfio_huge() -> Result<()> {
    let setup = Setup {
        backend: Backend::Huge,
        ..Setup::new("vfio-huge")
    };
    huge_pages(setup.memory)?;
    vfio_scenario(setup)?;
    huge_pages(0)
}

fn plug(machine: &mut Machine, nvme: &Nvme) -> Result<()> {
    let device = json!({"driver": "vfio-pci", "id": "disk", "host": nvme.address, "bus": "plug"});
    machine.qmp.execute("device_add", device)?;
    Ok(())
}

fn vfio_hotplug_and_reset() -> Result<()> {
    evidence::no_udmabuf()?;
    let nvme = Nvme::find()?;
    nvme.prepare()?;
    let setup = Setup::new("vfio-hotplug");
    let mut machine = start(&setup)?;
    // The GPU's buffers exist first.
    check_screen(&mut machine, 1..3)?;
    let before = evidence::pins()?;
    timed("device_add with live buffers", || plug(&mut machine, &nvme))?;
    check_disk_and_screen(&mut machine, 3..6)?;
    check_locked(&machine, &setup)?;
    // The guest reboots with both.
    timed("system_reset until the guest is ready", || machine.reset())?;
    show(&mut machine, &setup)?;
    check_disk_and_screen(&mut machine, 6..8)?;
    check_locked(&machine, &setup)?;
    // The device is unplugged while buffers live.
    machine.qmp.execute("device_del", json!({"id": "disk"}))?;
    timed("device_del until DEVICE_DELETED", || {
        machine.qmp.event("DEVICE_DELETED", Duration::from_secs(60))
    })?;
    ensure!(
        machine.ask(&Request::Disks)? == Answer::Count(0),
        "the guest still has a disk"
    );
    check_screen(&mut machine, 8..10)?;
    let locked = evidence::status_kib(machine.process(), "VmLck")?;
    ensure!(
        locked == 0,
        "{locked} KiB are still locked after the device is gone"
    );
    let pins = evidence::pins()?;
    let own: u64 = machine.buffers()?.iter().map(|(_, info)| info.pins).sum();
    note(&format!(
        "pins: {before} before the device, {pins} after it"
    ));
    ensure!(
        pins == i64::try_from(own)?,
        "{own} of {pins} pins are pinbuf's"
    );
    machine.quit()?;
    nvme.take_back()
}

/// Lets a user run QEMU.
pub fn permit(nvme: Option<&Nvme>, uid: u32) -> Result<()> {
    let mut paths = vec!["/dev/kvm".into(), "/dev/pinbuf".into()];
    if let Some(nvme) = nvme {
        paths.push("/dev/vfio/vfio".into());
        paths.push(nvme.group()?);
    }
    for path in paths {
        std::os::unix::fs::chown(&path, Some(uid), None)
            .with_context(|| format!("{}", path.display()))?;
    }
    Ok(())
}

/// The limit that operators set for vfio: the guest's memory and a little more.
fn sane_limit(setup: &Setup) -> u64 {
    (setup.memory + 64) << 20
}

fn vfio_memlock() -> Result<()> {
    const UID: u32 = 1000;
    evidence::no_udmabuf()?;
    let nvme = Nvme::find()?;
    nvme.prepare()?;
    permit(Some(&nvme), UID)?;
    let mut setup = Setup {
        vfio: Some(nvme.address.clone()),
        ..Setup::new("vfio-memlock")
    };
    setup.user = Some(User {
        uid: UID,
        memlock: sane_limit(&setup),
    });
    // The limit is in force: with less than the guest's memory vfio refuses.
    let less = Setup {
        name: "vfio-memlock-less".to_owned(),
        user: Some(User {
            uid: UID,
            memlock: (setup.memory - 64) << 20,
        }),
        ..setup.clone()
    };
    let said = refusal(&less)?;
    note(&format!("with a lower limit: {}", said.trim_end()));
    ensure!(
        said.contains("Cannot allocate memory"),
        "that is about something else"
    );
    let mut machine = start(&setup)?;
    check_disk_and_screen(&mut machine, 1..3)?;
    check_locked(&machine, &setup)?;
    machine.quit()?;
    permit(None, 0)?;
    nvme.take_back()
}

fn two_machines() -> Result<()> {
    const UID: u32 = 1001;
    evidence::no_udmabuf()?;
    let nvme = Nvme::find()?;
    nvme.prepare()?;
    permit(Some(&nvme), UID)?;
    // Debian's default limit, and the limit that vfio needs, for one user.
    let mut small = Setup::new("two-small");
    small.user = Some(User {
        uid: UID,
        memlock: 8 << 20,
    });
    let mut large = Setup {
        vfio: Some(nvme.address.clone()),
        ..Setup::new("two-large")
    };
    large.user = Some(User {
        uid: UID,
        memlock: sane_limit(&large),
    });
    let mut first = start(&small)?;
    let mut second = start(&large)?;
    for frame in [1, 2] {
        check_screen(&mut first, frame..frame + 1)?;
        check_disk_and_screen(&mut second, frame + 5..frame + 6)?;
    }
    first.quit()?;
    check_screen(&mut second, 20..21)?;
    check_locked(&second, &large)?;
    second.quit()?;
    permit(None, 0)?;
    nvme.take_back()
}

fn has_udmabuf(parameter: &str, value: u64) -> Result<()> {
    let path = format!("/sys/module/udmabuf/parameters/{parameter}");
    fs::write(&path, value.to_string()).context("this needs a kernel with udmabuf")?;
    let now: u64 = fs::read_to_string(&path)?.trim().parse()?;
    ensure!(now == value, "{parameter} is {now}");
    Ok(())
}

/// The comparison: what QEMU does on udmabuf, with 7.2's default limits set explicitly.
pub fn on_udmabuf(name: &str) -> Result<Setup> {
    has_udmabuf("size_limit_mb", 64)?;
    has_udmabuf("list_limit", 1024)?;
    Ok(Setup {
        pinbuf: false,
        ..Setup::new(name)
    })
}

/// Fails if the screen is what was drawn.
fn check_not_shown(machine: &mut Machine) -> Result<()> {
    let expected = machine.draw(1)?;
    let said = match machine.picture() {
        // QEMU has no picture at all.
        Err(error) => format!("{error:#}"),
        Ok(picture) => match picture.wrong(expected) {
            Ok((0, _)) => bail!("udmabuf shows it: this is no comparison any more"),
            Ok((wrong, first)) => format!("{wrong} pixels are wrong; {first}"),
            Err(error) => format!("{error:#}"),
        },
    };
    note(&format!("on udmabuf: {said}"));
    note(&format!("QEMU says: {}", last_message(machine)?));
    Ok(())
}

fn udmabuf_refuses_8k() -> Result<()> {
    let setup = on_udmabuf("udmabuf-1080p")?;
    // A small screen works.
    let mut machine = start(&setup)?;
    machine.frames(1..3)?;
    let buffers = evidence::buffers(machine.process())?;
    ensure!(
        !buffers.is_empty() && buffers.iter().all(|buffer| buffer.exporter == "udmabuf"),
        "{buffers:?}"
    );
    machine.quit()?;
    let setup = Setup {
        screen: (7680, 4320),
        memory: 768,
        ..on_udmabuf("udmabuf-8k")?
    };
    let mut machine = start(&setup)?;
    check_not_shown(&mut machine)?;
    machine.quit()
}

/// What `fragmented` shows on pinbuf: here the screen stays as it was, whatever the guest draws.
fn udmabuf_stale_fragmented() -> Result<()> {
    let setup = on_udmabuf("udmabuf-fragmented")?;
    let mut machine = start(&setup)?;
    machine.frames(1..3)?;
    let before = machine.draw(3)?;
    machine.picture()?.compare(before)?;
    let trace = evidence::ListTrace::start()?;
    show_fragmented(&mut machine, &setup)?;
    let items = trace.end()?;
    note(&format!(
        "numbers of items in QEMU's requests to udmabuf: {items:?}"
    ));
    let most = items.iter().copied().max().unwrap_or(0);
    ensure!(most > 1024, "that is not more than 1024");
    for frame in 4..7 {
        let drawn = machine.draw(frame)?;
        let picture = machine.picture()?;
        let (wrong, first) = picture.wrong(drawn)?;
        ensure!(
            wrong > 0,
            "udmabuf shows it: this is no comparison any more"
        );
        picture.compare(before).context("the screen is not stale")?;
        note(&format!(
            "the guest drew frame {frame}, QEMU shows frame {}, every pixel of it: {wrong} pixels \
             are stale; {first}",
            before.frame
        ));
    }
    note(&format!("QEMU says: {}", last_message(&machine)?));
    machine.quit()
}

/// The last line of what QEMU printed.
pub fn last_message(machine: &Machine) -> Result<String> {
    let messages = fs::read_to_string(machine.path("messages"))?;
    Ok(messages.lines().last().unwrap_or("nothing").to_owned())
}

/// With `movablecore=`: the inner guest's memory begins in ZONE_MOVABLE.
fn buffers_then_vfio_movable() -> Result<()> {
    leaving("movable", "movablecore=", |memory| memory.movable)
}

/// With a large `cma=`: much of it begins in the contiguous memory allocator's area.
fn buffers_then_vfio_cma() -> Result<()> {
    leaving("cma", "cma=", |memory| memory.cma)
}

/// Memory that begins where nothing may stay pinned: pinbuf's pin first, then vfio's.
fn leaving(name: &str, boot: &str, there: fn(&zones::Memory) -> u64) -> Result<()> {
    evidence::no_udmabuf()?;
    let nvme = Nvme::find()?;
    nvme.prepare()?;
    let setup = Setup::new(name);
    let mut machine = timed("QEMU starts and its guest is ready", || {
        Machine::start(&setup)
    })?;
    let before = zones::memory_of(machine.process())?;
    note(&format!("the guest's memory at first: {before:?}"));
    ensure!(
        there(&before) > before.all / 2,
        "less than half of it begins there: boot with a larger {boot}"
    );
    show(&mut machine, &setup)?;
    check_screen(&mut machine, 1..4)?;
    let pages = machine.screen_buffer()?.pages;
    let pinned = zones::memory_of(machine.process())?;
    note(&format!("with a screen of {pages} pages: {pinned:?}"));
    ensure!(
        pinned.movable + pinned.cma + pages <= pinned.all,
        "the screen's pages lie where nothing may stay pinned"
    );
    // vfio pins while pinbuf's buffers live.
    timed("device_add with live buffers", || plug(&mut machine, &nvme))?;
    check_disk_and_screen(&mut machine, 4..7)?;
    check_locked(&machine, &setup)?;
    let after = zones::memory_of(machine.process())?;
    note(&format!("with vfio: {after:?}"));
    ensure!(
        after.movable == 0 && after.cma == 0,
        "vfio's pages lie where nothing may stay pinned: {after:?}"
    );
    machine.quit()?;
    nvme.take_back()
}

/// The other way round: vfio has pinned everything when the buffers are made.
fn vfio_then_buffers_movable() -> Result<()> {
    vfio_scenario(Setup::new("movable-vfio"))
}

/// The memory that the screen was migrated from can be taken offline while the screen is live.
fn offline_under_screen() -> Result<()> {
    evidence::no_udmabuf()?;
    // Some blocks can never be taken offline. Only those count that can be without any buffer.
    let willing = zones::willing_blocks()?;
    note(&format!(
        "{} blocks of ZONE_MOVABLE go offline while there is no buffer: {willing:?}",
        willing.len()
    ));
    let setup = Setup::new("offline");
    let mut machine = timed("QEMU starts and its guest is ready", || {
        Machine::start(&setup)
    })?;
    let blocks = zones::blocks_of(machine.process())?;
    show(&mut machine, &setup)?;
    check_screen(&mut machine, 1..3)?;
    let (block, pages) = blocks
        .into_iter()
        .filter(|(block, _)| willing.contains(block))
        .max_by_key(|&(_, pages)| pages)
        .context("none of these blocks has the guest's memory")?;
    note(&format!(
        "block {block} held {pages} pages of the guest at first"
    ));
    timed("the block goes offline", || zones::set_online(block, false))?;
    let result = check_screen(&mut machine, 3..6);
    zones::set_online(block, true)?;
    result?;
    machine.quit()
}

/// For the demo: a virtual machine with a passed-through device, and a picture of its screen.
pub fn demo(picture: &Path) -> Result<()> {
    evidence::no_udmabuf()?;
    let say = |text: &str| println!("  {text}");
    let nvme = Nvme::find()?;
    nvme.prepare()?;
    let setup = Setup {
        vfio: Some(nvme.address.clone()),
        ..Setup::new("demo")
    };
    say("stock QEMU starts on pinbuf, with an nvme passed through by vfio (no udmabuf here)");
    let mut machine = Machine::start(&setup)?;
    show(&mut machine, &setup)?;
    machine.disk_start(vfio::PLAN)?;
    machine.frames(1..4)?;
    let file = machine.path("screen.png");
    let arguments = json!({"filename": file.display().to_string(), "format": "png"});
    machine.qmp.execute("screendump", arguments)?;
    let (read, written) = machine.disk_stop()?;
    check_locked(&machine, &setup)?;
    let info = machine.screen_buffer()?;
    fs::copy(&file, picture).context("QEMU wrote no picture")?;
    machine.quit()?;
    nvme.take_back()?;
    let screen = setup.screen;
    say(&format!(
        "3 frames of {}x{} drawn in the inner guest: every pixel right in QEMU's picture",
        screen.0, screen.1
    ));
    say(&format!(
        "QEMU's screen is a dma-buf of pinbuf's: {} pages in {} extents",
        info.pages, info.extents
    ));
    say(&format!(
        "meanwhile the disk: {} KiB read, {} KiB written, all right, seen from both sides",
        read >> 10,
        written >> 10
    ));
    Ok(())
}
