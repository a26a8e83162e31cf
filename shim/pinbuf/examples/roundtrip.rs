// SPDX-License-Identifier: MIT OR Apache-2.0

//! The example of `docs/programming.md`.

use pinbuf::{Access, Device, Region};

fn main() -> Result<(), pinbuf::Error> {
    let memory = Region::anonymous(4 << 20)?;
    memory.write_at(0, b"pinbuf")?;
    let buffer = Device::open()?.export(&memory)?; // pinned until its last user is gone
    let mapping = buffer.map()?;
    let access = mapping.begin(Access::Read)?;
    let mut bytes = [0; 6];
    access.read_at(0, &mut bytes)?;
    assert_eq!(&bytes, b"pinbuf"); // the same pages
    access.finish()
}
