// SPDX-License-Identifier: GPL-2.0

//! Structs that grow, against the rule as `uapi/pinbuf.h` puts it, and arrays.

use crate::uaccess::{read_array, read_struct, write_struct, Extensible};
use kernel::{
    alloc::fail_after,
    page::PAGE_SIZE,
    prelude::{E2BIG, EFAULT, EINVAL, ENOMEM, EOVERFLOW},
    uaccess::User,
};
use proptest::prelude::*;

/// Version 3 of something.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Thing {
    size: u32,
    first: u32,
    /// Since version 2.
    second: [u64; 12],
    /// Since version 3.
    third: u64,
}

const FIRST: usize = 8;
const SIZE: usize = size_of::<Thing>();

// SAFETY: Integers without padding, the first one the size.
unsafe impl Extensible for Thing {
    const FIRST_SIZE: usize = FIRST;
}

fn bytes_of(thing: Thing) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&thing.size.to_ne_bytes());
    bytes.extend_from_slice(&thing.first.to_ne_bytes());
    for word in thing.second.iter().chain([&thing.third]) {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes
}

/// Sizes at which something changes.
fn sizes() -> impl Strategy<Value = usize> {
    prop_oneof![
        2 => 0..SIZE + 1,
        2 => SIZE..SIZE + 200,
        1 => Just(SIZE),
        1 => PAGE_SIZE - 3..PAGE_SIZE + 4,
        1 => Just(u32::MAX as usize),
    ]
}

/// A caller's memory: the size that it claims, bytes, how many zeroes follow these, and how many
/// bytes of it all are mapped.
fn callers() -> impl Strategy<Value = (usize, Vec<u8>)> {
    let known = proptest::collection::vec(any::<u8>(), SIZE);
    let tail = prop_oneof![
        2 => Just(None),
        1 => (0..400usize, 1..=255u8).prop_map(Some),
        1 => (3900..4200usize, 1..=255u8).prop_map(Some),
    ];
    let mapped = prop_oneof![3 => Just(usize::MAX), 2 => 0..SIZE + 260, 1 => 4000..4200usize];
    (sizes(), known, tail, mapped).prop_map(|(claimed, mut bytes, tail, mapped)| {
        bytes.resize(SIZE + 4200, 0);
        bytes[..4].copy_from_slice(&(claimed as u32).to_ne_bytes());
        if let Some((place, byte)) = tail {
            bytes[SIZE + place] = byte;
        }
        bytes.truncate(mapped);
        (claimed, bytes)
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 4096 },
        ..ProptestConfig::default()
    })]

    #[test]
    fn reading_follows_the_rule((claimed, bytes) in callers(), other in any::<[u8; 4]>()) {
        let mut user = User::new(bytes.clone());
        // Another thread is never far.
        user.change = Some(other);
        let (result, user) = user.call(read_struct::<Thing>);

        let in_tail = bytes.iter().take(claimed).skip(SIZE).position(|byte| *byte != 0);
        if bytes.len() < 4 {
            prop_assert_eq!(result, Err(EFAULT));
        } else if claimed < FIRST {
            prop_assert_eq!(result, Err(EINVAL));
        } else if claimed > PAGE_SIZE {
            prop_assert_eq!(result, Err(E2BIG));
        } else if bytes.len() < claimed {
            // Something unknown may be found before the end of what is mapped.
            let early = in_tail.is_some();
            prop_assert!(result == Err(EFAULT) || early && result == Err(E2BIG), "{:?}", result);
        } else if in_tail.is_some() {
            prop_assert_eq!(result, Err(E2BIG));
        } else {
            let (thing, size) = result.unwrap();
            prop_assert_eq!(size, claimed);
            let mut expected = bytes[..claimed.min(SIZE)].to_vec();
            expected.resize(SIZE, 0);
            prop_assert_eq!(bytes_of(thing), expected);
        }
        // Behind the size each byte is read at most once, and none behind the struct is.
        for (index, reads) in user.reads.iter().enumerate() {
            let most = if index < 4 { 2 } else { u32::from(index < claimed) };
            prop_assert!(*reads <= most, "byte {} was read {} times", index, reads);
        }
    }

    #[test]
    fn writing_fills_what_the_caller_has(
        claimed in FIRST..PAGE_SIZE + 1,
        words in any::<[u64; 4]>(),
        missing in prop_oneof![2 => Just(0usize), 1 => 1..200usize],
        writable in prop::bool::weighted(0.8),
    ) {
        let thing = Thing {
            size: SIZE as u32,
            first: words[0] as u32,
            second: [words[1]; 12],
            third: words[2],
        };
        const OLD: u8 = 0xa5;
        let mut user = User::new(vec![OLD; claimed + 64]);
        let there = claimed.saturating_sub(missing);
        if missing > 0 {
            user.bytes.truncate(there);
        }
        user.writable = writable;
        let (result, user) = user.call(|at| write_struct(at, thing, claimed));
        let known = claimed.min(SIZE);
        let fits = writable && user.bytes.len() >= known;
        prop_assert_eq!(result, if fits { Ok(()) } else { Err(EFAULT) });
        if result.is_ok() {
            prop_assert_eq!(&user.bytes[..known], &bytes_of(thing)[..known]);
            prop_assert!(user.bytes[known..].iter().all(|byte| *byte == OLD));
        }
    }

    #[test]
    fn arrays_are_read_once_and_whole(
        words in proptest::collection::vec(any::<u32>(), 0..300),
        missing in prop_oneof![3 => Just(0usize), 1 => 1..9usize],
        before in 0usize..3,
        allocations in proptest::option::of(0usize..2),
    ) {
        let mut bytes = vec![0xa5; before];
        words.iter().for_each(|word| bytes.extend_from_slice(&word.to_ne_bytes()));
        let there = bytes.len().saturating_sub(missing);
        let mut user = User::new(bytes);
        user.bytes.truncate(there);
        fail_after(allocations);
        let (result, user) = user.call(|_| {
            read_array::<u32>((User::BASE + before) as u64, words.len())
        });
        fail_after(None);
        let error = result.as_ref().err().copied();
        if allocations == Some(0) && words.len() > 1 {
            prop_assert_eq!(error, Some(ENOMEM));
        } else if missing > 0 && !words.is_empty() {
            prop_assert_eq!(error, Some(EFAULT));
        } else {
            prop_assert_eq!(error, None);
            prop_assert_eq!(&*result.unwrap(), &words[..]);
            prop_assert!(user.reads.iter().skip(before).all(|reads| *reads == 1));
        }
    }
}

/// A number of elements whose bytes cannot be counted is refused before anything is allocated.
#[test]
fn arrays_that_are_too_long() {
    let (result, _) =
        User::new(vec![0; 8]).call(|_| read_array::<u32>(User::BASE as u64, usize::MAX / 2));
    assert_eq!(result.err(), Some(EOVERFLOW));
}
