// SPDX-License-Identifier: MIT OR Apache-2.0

//! Makes a buffer of ordinary memory, shows what it consists of, and keeps it until standard
//! input ends: `pinbuf info` shows it meanwhile.

use std::error::Error;
use std::io::Read;

use pinbuf::{Access, Device, DmaBuf, DrmFourcc, Image, Region};

fn main() -> Result<(), Box<dyn Error>> {
    let device = Device::open()?;
    println!("{:?}", device.query()?);
    let image = Image::new(DrmFourcc::Xrgb8888, 1920, 1080)?;
    let memory = Region::huge_advised(image.size())?;
    memory.write_at(image.row_offset(0, 100)?, b"row 100")?;
    let buffer = device.export(&memory)?;
    image.check_size(buffer.size()?)?;
    println!("{:?}", buffer.info(&device)?);

    // As another process would see it.
    let received = DmaBuf::from_fd(buffer.try_clone()?.into())?;
    let mapping = received.map()?;
    let access = mapping.begin(Access::Read)?;
    let mut bytes = [0; 7];
    access.read_at(image.row_offset(0, 100)?, &mut bytes)?;
    access.finish()?;
    println!(
        "mapped at {:p}: {}",
        mapping.as_ptr(),
        String::from_utf8_lossy(&bytes)
    );
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
