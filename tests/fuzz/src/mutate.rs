// SPDX-License-Identifier: MIT OR Apache-2.0

//! New inputs, and new ones out of old ones.

use arbitrary::{Arbitrary, Unstructured};
use fastrand::Rng;
use serde_json::{Number, Value};

use crate::input::{
    Address, Backing, Caller, Create, Envelope, Flags, Input, Kind, Length, Offset, Operation,
    Page, Pages, Piece, Place, Protection, Region, Sharing, Wild,
};
use crate::memory::SLOTS;

/// The maximum number of operations of an input.
const OPERATIONS: usize = 40;
/// One input in [`FORKS`] may fork: a fork costs as much as all else that an input does.
const FORKS: u32 = 32;

/// A random value of any type.
fn any<T: for<'a> Arbitrary<'a>>(rng: &mut Rng) -> T {
    loop {
        let mut bytes = [0; 512];
        rng.fill(&mut bytes);
        if let Ok(value) = T::arbitrary(&mut Unstructured::new(&bytes)) {
            return value;
        }
    }
}

/// What may be done to a mapping.
fn on_mapping(rng: &mut Rng) -> Operation {
    loop {
        let operation = any::<Operation>(rng);
        if matches!(
            operation,
            Operation::Touch(..)
                | Operation::Remap(..)
                | Operation::Unmap(..)
                | Operation::Protect(..)
                | Operation::Advise(..)
                | Operation::Fork(..)
        ) {
            return operation;
        }
    }
}

/// A buffer of 1 GiB or more: a few huge pages, again and again. It is mapped where entries of every
/// size fit, and the mapping is taken apart.
fn generate_large(rng: &mut Rng) -> Input {
    const PAGES: u16 = 1024;
    let create = Create {
        envelope: Envelope::default(),
        flags: Flags(pinbuf_uapi::CREATE_CLOEXEC),
        pieces: vec![Piece {
            at: Address::Region(0, Page(0)),
            length: Length(u64::from(PAGES) * 4096),
            backing: Backing::Right,
        }],
        repeat: rng.u16(250..520),
        count: None,
        ranges: Place::Plain,
        backing: None,
    };
    let mut operations = vec![if rng.bool() {
        Operation::Giga
    } else {
        Operation::Create(create)
    }];
    for _ in 0..rng.usize(1..4) {
        operations.push(Operation::Map {
            buffer: 0,
            offset: Offset(rng.u64(..4) * (2 << 20)),
            length: Offset(0),
            protection: Protection(3),
            sharing: Sharing::Shared,
            aligned: rng.u32(..4) > 0,
        });
        operations.extend((0..rng.usize(1..8)).map(|_| on_mapping(rng)));
    }
    Input {
        caller: Caller::default(),
        memory: vec![Region {
            kind: Kind::HugeMemfd,
            pages: Pages(PAGES),
            populated: true,
        }],
        operations,
    }
}

/// An input out of nothing.
pub fn generate(rng: &mut Rng) -> Input {
    if rng.u32(..12) == 0 {
        return generate_large(rng);
    }
    let memory = (0..rng.usize(1..=SLOTS))
        .map(|_| any::<Region>(rng))
        .collect();
    let operations = (0..rng.usize(1..=12))
        .map(|_| any::<Operation>(rng))
        .collect();
    let mut input = Input {
        caller: any(rng),
        memory,
        operations,
    };
    thin_out(rng, &mut input);
    input
}

/// An input that differs from `old` a little, perhaps with a part of `other`.
pub fn mutate(rng: &mut Rng, old: &Input, other: &Input) -> Input {
    let mut input = old.clone();
    for _ in 0..=rng.usize(0..4) {
        let length = input.operations.len();
        match rng.u32(0..16) {
            0..=2 => input
                .operations
                .insert(rng.usize(0..=length), any::<Operation>(rng)),
            3 if length > 1 => drop(input.operations.remove(rng.usize(0..length))),
            4 if length > 0 => {
                let again = input.operations[rng.usize(0..length)].clone();
                input.operations.insert(rng.usize(0..=length), again);
            }
            5 if length > 1 => input
                .operations
                .swap(rng.usize(0..length), rng.usize(0..length)),
            6 if length > 0 => input.operations[rng.usize(0..length)] = any::<Operation>(rng),
            7 if !other.operations.is_empty() => {
                let start = rng.usize(0..other.operations.len());
                let end = rng.usize(start..=other.operations.len());
                let at = rng.usize(0..=length);
                input
                    .operations
                    .splice(at..at, other.operations[start..end].iter().cloned());
            }
            8 if !input.memory.is_empty() => {
                let index = rng.usize(0..input.memory.len());
                input.memory[index] = any::<Region>(rng);
            }
            9 if input.memory.len() < SLOTS => input.memory.push(any::<Region>(rng)),
            10 if rng.bool() => input.caller = any(rng),
            _ => {
                if let Some(changed) = change_number(rng, &input) {
                    input = changed;
                }
            }
        }
    }
    thin_out(rng, &mut input);
    input.operations.truncate(OPERATIONS);
    input
}

/// A fork takes as long as a whole input without one: few inputs have one, and none has two. Devices take
/// as long as all the rest: half of all inputs have none.
fn thin_out(rng: &mut Rng, input: &mut Input) {
    let mut forks = rng.u32(..FORKS) == 0;
    let devices = rng.bool();
    input.operations.retain(|operation| match operation {
        Operation::Fork(..) => std::mem::take(&mut forks),
        Operation::Attach(..) => devices,
        _ => true,
    });
}

/// Changes any number or truth value in an input. `None` if that would be no input any more.
fn change_number(rng: &mut Rng, input: &Input) -> Option<Input> {
    let mut value = serde_json::to_value(input).ok()?;
    let mut leaves = Vec::new();
    collect(&mut value, &mut leaves);
    let index = rng.usize(0..leaves.len().max(1));
    match leaves.into_iter().nth(index)? {
        Value::Bool(truth) => *truth = !*truth,
        Value::Number(number) => *number = other_number(rng, number),
        _ => return None,
    }
    serde_json::from_value(value).ok()
}

fn collect<'a>(value: &'a mut Value, leaves: &mut Vec<&'a mut Value>) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(|value| collect(value, leaves)),
        Value::Object(fields) => fields.values_mut().for_each(|value| collect(value, leaves)),
        Value::Bool(_) | Value::Number(_) => leaves.push(value),
        Value::Null | Value::String(_) => {}
    }
}

fn other_number(rng: &mut Rng, number: &Number) -> Number {
    let Some(old) = number.as_u64() else {
        return Number::from(rng.i32(-3..100));
    };
    let step = *rng.choice(&[1, 2, 8, 64, 512, 4096, 1 << 21]).unwrap_or(&1);
    Number::from(match rng.u32(0..8) {
        0 | 1 => old.wrapping_add(step),
        2 | 3 => old.wrapping_sub(step),
        4 => old ^ (1 << rng.u32(0..64)),
        5 => old.wrapping_mul(2),
        6 => *rng.choice(Wild::EDGES).unwrap_or(&0),
        _ => rng.u64(0..16),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_generated_survives_json() {
        let mut rng = Rng::with_seed(1);
        let mut old = generate(&mut rng);
        for _ in 0..2000 {
            let fresh = generate(&mut rng);
            let text = serde_json::to_string(&fresh).unwrap();
            assert_eq!(serde_json::from_str::<Input>(&text).unwrap(), fresh);
            old = mutate(&mut rng, &old, &fresh);
            assert!(old.operations.len() <= OPERATIONS && old.memory.len() <= SLOTS);
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_inputs() {
        let inputs = |seed| {
            let mut rng = Rng::with_seed(seed);
            let first = generate(&mut rng);
            let second = generate(&mut rng);
            let third = mutate(&mut rng, &first, &second);
            [first, second, third]
        };
        assert_eq!(inputs(7), inputs(7));
        assert_ne!(inputs(7), inputs(8));
    }

    #[test]
    fn every_number_can_change() {
        let mut rng = Rng::with_seed(2);
        let input = generate(&mut rng);
        let changed = (0..200).filter_map(|_| change_number(&mut rng, &input));
        assert!(changed.filter(|other| *other != input).count() > 50);
    }
}
