// SPDX-License-Identifier: MIT OR Apache-2.0

//! Addresses at which a file was mapped, or at which another process has it mapped: what is there now may be late memory of
//! another file, which a create must neither fill nor wait for.

use std::ffi::c_int;

use anyhow::{Context, Result};

use crate::cases::{device, File, Spec, Table, OK};
use crate::late::{Faults, Mode, SORTS};
use crate::mappings::has;
use crate::run::Outcome;
use crate::udmabuf::{close, create, create_list, Map, PAGE};
use crate::unfilled::{empty, go_on_in_child, owned};

pub fn cases(t: &mut Table) {
    for (sort, spec, unit) in SORTS {
        let whole = spec.whole();
        t.custom(format!("beside-late/moved-{sort}"), OK, move || {
            let device = device()?;
            let file = File::new(0, whole)?;
            let map = Map::shared(file.fd, whole.bytes)?;
            close(create(device, file.fd, 0, whole.bytes, 0)?)?;
            let other = File::new(1, empty(whole))?;
            let _other = in_place_of(map, &other, whole.bytes)?;
            beside(device, &file, &other, whole, unit)
        });
        // This thread is the one that would have to supply pages.
        t.custom(format!("beside-late/moved-alone-{sort}"), OK, move || {
            let device = device()?;
            let file = File::new(0, whole)?;
            let map = Map::shared(file.fd, whole.bytes)?;
            close(create(device, file.fd, 0, whole.bytes, 0)?)?;
            let other = File::new(1, empty(whole))?;
            let other = in_place_of(map, &other, whole.bytes)?;
            let _faults = Faults::of(&other, whole.bytes, unit, Mode::Missing)?;
            // SAFETY: no memory is involved; a call that waits for ever is a result too.
            unsafe { libc::alarm(20) };
            seen(create(device, file.fd, 0, whole.bytes, 0), whole.bytes)
        });
        t.custom(format!("beside-late/forked-{sort}"), OK, move || {
            let device = device()?;
            let file = File::new(0, whole)?;
            let map = Map::shared(file.fd, whole.bytes)?;
            go_on_in_child()?;
            let other = File::new(1, empty(whole))?;
            let _other = in_place_of(map, &other, whole.bytes)?;
            beside(device, &file, &other, whole, unit)
        });
        // Of the files of one list, the one that has no holes is mapped twice.
        t.custom(format!("beside-late/list-{sort}"), OK, move || {
            let device = device()?;
            let late = File::new(1, empty(whole))?;
            let map = Map::shared(late.fd, whole.bytes)?;
            let faults = Faults::of(&map, whole.bytes, unit, Mode::Missing)?;
            faults.answer(0)?;
            let file = File::new(0, whole)?;
            let _first = Map::shared(file.fd, whole.bytes)?;
            let _second = Map::shared(file.fd, whole.bytes)?;
            let items = [file.item(0, whole.bytes), late.item(0, unit)];
            seen(create_list(device, &items, 0), whole.bytes)
        });
    }
}

/// Maps another file where one was mapped.
fn in_place_of(map: Map, other: &File, bytes: u64) -> Result<Map> {
    let address = map.address();
    drop(map);
    let there = Map::shared_at(other.fd, bytes, address).context("mapping in its place")?;
    Ok(there)
}

/// A buffer of a file that is not mapped, while the pages of another file are late.
fn beside(device: c_int, file: &File, other: &File, spec: Spec, unit: u64) -> Result<Outcome> {
    let registered = Map::shared(other.fd, spec.bytes)?;
    let faults = Faults::of(&registered, spec.bytes, unit, Mode::Missing)?;
    let (result, mut outcome) = owned(&faults, unit, 0..spec.bytes / unit, || {
        create(device, file.fd, 0, spec.bytes, 0)
    })?;
    outcome.facts.extend(seen(result, spec.bytes)?.facts);
    Ok(outcome)
}

fn seen(result: std::io::Result<c_int>, bytes: u64) -> Result<Outcome> {
    let mut outcome = Outcome::of(&result);
    if let Ok(dmabuf) = result {
        outcome.fact("contents", has(dmabuf, 0..bytes / PAGE)?);
    }
    Ok(outcome)
}
