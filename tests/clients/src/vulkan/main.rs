// SPDX-License-Identifier: MIT OR Apache-2.0

//! A Vulkan program: has Mesa's software renderer fill, draw and copy, hands the memory out as
//! dma-bufs, compares every word and every pixel there, and asks pinbuf whether the buffers are its
//! own.  The status is 3 if the renderer hands out no dma-bufs.

mod gpu;

use std::process::ExitCode;

use anyhow::{ensure, Context, Result};
use ash::vk;
use pinbuf_test_harness::support::{Buffer, Device, Memory, Sync};

use gpu::{Allocation, Gpu, COLOR};

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            println!("no export of dma-bufs");
            ExitCode::from(3)
        }
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let Some(gpu) = Gpu::open()? else {
        return Ok(false);
    };
    filled(&gpu).context("a buffer that Vulkan fills")?;
    copied(&gpu).context("a buffer that Vulkan copies from")?;
    drawn(&gpu).context("an image that Vulkan draws")?;
    Ok(true)
}

/// Hands memory out, and proves that pinbuf made the dma-buf.
fn export(gpu: &Gpu, allocation: &Allocation, what: &str) -> Result<(Buffer, Memory)> {
    let buffer = Buffer::from_fd(gpu.export(allocation)?);
    let info = Device::open()?
        .describe(&buffer)
        .context("the dma-buf is none of pinbuf's")?;
    let size = buffer.len()? as u64;
    ensure!(size == info.bytes, "pinbuf says {info:?}");
    ensure!(size >= allocation.size, "the dma-buf has {size} bytes only");
    println!(
        "{what}: {size} bytes of pinbuf's, in {} extents",
        info.extents
    );
    let mapping = buffer.map()?;
    Ok((buffer, mapping))
}

/// Bytes of the buffers.
const SIZE: usize = 8 << 20;
/// What is filled with one word, bytes.
const PART: usize = 64 << 10;

/// Vulkan fills the memory, part by part; the dma-buf has it, also when Vulkan has freed its own.
fn filled(gpu: &Gpu) -> Result<()> {
    let word = |part: usize| (part as u32 + 1).wrapping_mul(0x9e37_79b9);
    let (buffer, allocation) = gpu.buffer(SIZE as u64, true)?;
    let (dmabuf, mapping) = export(gpu, &allocation, "filled")?;
    gpu.run(|device, commands| {
        for part in 0..SIZE / PART {
            let (offset, size) = ((part * PART) as u64, PART as u64);
            // SAFETY: recording; inside of the buffer.
            unsafe { device.cmd_fill_buffer(commands, buffer, offset, size, word(part)) };
        }
    })?;
    gpu.free(allocation);
    let mut data = vec![0; PART];
    dmabuf.synced(Sync::Read, || -> Result<()> {
        for part in 0..SIZE / PART {
            mapping.read(part * PART, &mut data);
            for (index, seen) in words(&data).enumerate() {
                let wanted = word(part);
                ensure!(
                    seen == wanted,
                    "word {index} of part {part}: expected {wanted:#x}, seen {seen:#x}"
                );
            }
        }
        Ok(())
    })??;
    println!("filled: {} words are right", SIZE / 4);
    Ok(())
}

/// The process writes through the dma-buf; Vulkan copies what it finds.
fn copied(gpu: &Gpu) -> Result<()> {
    let word = |index: usize| (index as u32).wrapping_mul(0x85eb_ca6b) ^ 0x5bd1_e995;
    let (source, allocation) = gpu.buffer(SIZE as u64, true)?;
    let (dmabuf, mapping) = export(gpu, &allocation, "copied")?;
    let pattern: Vec<u8> = (0..SIZE / 4)
        .flat_map(|index| word(index).to_ne_bytes())
        .collect();
    dmabuf.synced(Sync::Write, || mapping.write(0, &pattern))?;
    let (target, copy) = gpu.buffer(SIZE as u64, false)?;
    gpu.run(|device, commands| {
        let all = [vk::BufferCopy::default().size(SIZE as u64)];
        // SAFETY: recording; both buffers are of this size.
        unsafe { device.cmd_copy_buffer(commands, source, target, &all) };
    })?;
    let mut data = vec![0; SIZE];
    gpu.read(&copy, &mut data)?;
    for (index, seen) in words(&data).enumerate() {
        let wanted = word(index);
        ensure!(
            seen == wanted,
            "word {index}: expected {wanted:#x}, seen {seen:#x}"
        );
    }
    println!("copied: {} words are right", SIZE / 4);
    Ok(())
}

fn words(data: &[u8]) -> impl Iterator<Item = u32> + '_ {
    data.chunks_exact(4)
        .map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]))
}

const WIDTH: u32 = 640;
const HEIGHT: u32 = 480;
/// The picture's squares, pixels.
const SQUARE: u32 = 32;
/// Red, green, blue, alpha: one for each sort of square; the first is the background.
const COLORS: [[u8; 4]; 5] = [
    [0x10, 0x20, 0x30, 0xff],
    [0xff, 0x00, 0x00, 0xff],
    [0x00, 0xff, 0x00, 0x80],
    [0x00, 0x00, 0xff, 0x00],
    [0xc0, 0xc0, 0x40, 0xff],
];

/// Which colour a pixel has.
fn color(x: u32, y: u32) -> usize {
    ((x / SQUARE) * 3 + (y / SQUARE) * 7) as usize % COLORS.len()
}

fn clear_value(color: [u8; 4]) -> vk::ClearValue {
    let float32 = color.map(|part| f32::from(part) / 255.0);
    vk::ClearValue {
        color: vk::ClearColorValue { float32 },
    }
}

/// Vulkan draws squares into an image; the dma-buf has each pixel.
fn drawn(gpu: &Gpu) -> Result<()> {
    let picture = gpu.image(WIDTH, HEIGHT, vk::Format::R8G8B8A8_UNORM)?;
    let (dmabuf, mapping) = export(gpu, &picture.allocation, "drawn")?;
    gpu.run(|device, commands| {
        let barrier = [vk::ImageMemoryBarrier::default()
            .image(picture.image)
            .old_layout(vk::ImageLayout::UNDEFINED)
            .new_layout(vk::ImageLayout::GENERAL)
            .dst_access_mask(vk::AccessFlags::COLOR_ATTACHMENT_WRITE)
            .subresource_range(COLOR)];
        // SAFETY: recording; the image is bound.
        unsafe {
            device.cmd_pipeline_barrier(
                commands,
                vk::PipelineStageFlags::TOP_OF_PIPE,
                vk::PipelineStageFlags::COLOR_ATTACHMENT_OUTPUT,
                vk::DependencyFlags::empty(),
                &[],
                &[],
                &barrier,
            );
        }
        let whole = vk::Rect2D {
            offset: vk::Offset2D::default(),
            extent: vk::Extent2D {
                width: WIDTH,
                height: HEIGHT,
            },
        };
        let target = [vk::RenderingAttachmentInfo::default()
            .image_view(picture.view)
            .image_layout(vk::ImageLayout::GENERAL)
            .load_op(vk::AttachmentLoadOp::CLEAR)
            .store_op(vk::AttachmentStoreOp::STORE)
            .clear_value(clear_value(COLORS[0]))];
        let info = vk::RenderingInfo::default()
            .render_area(whole)
            .layer_count(1)
            .color_attachments(&target);
        // SAFETY: recording; the view lives, and dynamic rendering was asked for.
        unsafe { device.cmd_begin_rendering(commands, &info) };
        for (index, &paint) in COLORS.iter().enumerate().skip(1) {
            let clear = [vk::ClearAttachment::default()
                .aspect_mask(vk::ImageAspectFlags::COLOR)
                .clear_value(clear_value(paint))];
            // SAFETY: rendering, to an attachment that covers the squares.
            unsafe { device.cmd_clear_attachments(commands, &clear, &squares(index)) };
        }
        // SAFETY: rendering.
        unsafe { device.cmd_end_rendering(commands) };
    })?;
    let mut row = vec![0; WIDTH as usize * 4];
    dmabuf.synced(Sync::Read, || -> Result<()> {
        for y in 0..HEIGHT {
            let start = picture.offset + u64::from(y) * picture.pitch;
            mapping.read(start as usize, &mut row);
            for (x, seen) in (0..WIDTH).zip(row.chunks_exact(4)) {
                let wanted = COLORS[color(x, y)];
                ensure!(
                    seen == wanted,
                    "pixel {x}, {y}: expected {wanted:x?}, seen {seen:x?}"
                );
            }
        }
        Ok(())
    })??;
    println!("drawn: {} pixels are right", WIDTH * HEIGHT);
    Ok(())
}

/// The squares of one colour.
fn squares(index: usize) -> Vec<vk::ClearRect> {
    let mut found = Vec::new();
    for y in (0..HEIGHT).step_by(SQUARE as usize) {
        for x in (0..WIDTH).step_by(SQUARE as usize) {
            if color(x, y) == index {
                found.push(vk::ClearRect {
                    rect: vk::Rect2D {
                        offset: vk::Offset2D {
                            x: x as i32,
                            y: y as i32,
                        },
                        extent: vk::Extent2D {
                            width: SQUARE,
                            height: SQUARE,
                        },
                    },
                    base_array_layer: 0,
                    layer_count: 1,
                });
            }
        }
    }
    found
}
