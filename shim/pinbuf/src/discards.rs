// SPDX-License-Identifier: MIT OR Apache-2.0

//! Parts of buffers that the memory's owner does not see any more.

use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use pinbuf_uapi as uapi;

use crate::{Device, DmaBuf, Error, Result};

nix::ioctl_readwrite_bad!(ioctl_discards, uapi::DISCARDS, uapi::Discards);

/// Size of the list of one call. Most buffers have no such parts.
const AT_ONCE: usize = 64;

/// What is known of a part of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DiscardState {
    /// The memory's owner does not see it any more, and never will again.
    Discarded,
    /// The kernel does not know whether the owner sees it.
    Unsure,
}

/// A part of a buffer that the memory's owner does not see any more, or may not see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Discard {
    /// Offset of its first byte in the buffer, a multiple of the page size.
    pub offset: u64,
    /// Number of bytes, a multiple of the page size.
    pub len: u64,
    /// What is known of it.
    pub state: DiscardState,
}

impl DmaBuf {
    /// The parts of the buffer that the memory's owner does not see any more, in their order: a hole
    /// was punched into the file, a balloon took the pages, the owner unmapped them or told the kernel
    /// to drop them. Devices and mappings of the buffer continue with the old pages.
    ///
    /// The time that this takes grows with the number of pages, or of huge pages.
    ///
    /// # Errors
    ///
    /// [`Error::NotADmaBuf`] if the buffer belongs to another exporter, [`Error::Unsupported`] if the
    /// kernel's pinbuf does not know the call.
    ///
    /// ```no_run
    /// # let device = pinbuf::Device::open()?;
    /// let memory = pinbuf::Region::anonymous(1 << 20)?;
    /// let buffer = device.export(&memory)?;
    /// assert!(buffer.discarded(&device)?.is_empty());
    /// drop(memory);
    /// assert_eq!(buffer.discarded(&device)?[0].len, 1 << 20);
    /// # Ok::<(), pinbuf::Error>(())
    /// ```
    pub fn discarded(&self, device: &Device) -> Result<Vec<Discard>> {
        self.discarded_from(device, 0)
    }

    fn discarded_from(&self, device: &Device, mut offset: u64) -> Result<Vec<Discard>> {
        let mut all = Vec::new();
        loop {
            let mut list = [uapi::Discard::default(); AT_ONCE];
            let mut call = uapi::Discards {
                size: size_of::<uapi::Discards>() as u32,
                fd: self.as_fd().as_raw_fd(),
                offset,
                list: list.as_mut_ptr() as u64,
                count: list.len() as u32,
                reserved: 0,
            };
            // SAFETY: PINBUF_DISCARDS reads and writes this struct, and writes as many elements to the
            // list as it has.
            match unsafe { ioctl_discards(device.as_fd().as_raw_fd(), &mut call) } {
                Ok(_) => {}
                Err(Errno::EINVAL) => return Err(Error::NotADmaBuf),
                Err(Errno::ENOTTY) => return Err(Error::Unsupported),
                Err(errno) => return Err(Error::system("PINBUF_DISCARDS")(errno)),
            }
            let found = &list[..list.len().min(call.count as usize)];
            all.extend(found.iter().map(|part| Discard {
                offset: part.offset,
                len: part.len,
                state: match part.state {
                    uapi::STATE_DISCARDED => DiscardState::Discarded,
                    _ => DiscardState::Unsure,
                },
            }));
            // A list that is not full ends at the end of the buffer.
            if found.len() < list.len() || call.offset <= offset {
                return Ok(all);
            }
            offset = call.offset;
        }
    }
}

/// Finds out, for many buffers, which parts the memory's owner does not see any more.
///
/// It holds references of any kind to the device and to buffers: `&DmaBuf`, `Arc<DmaBuf>`. It has no
/// thread: call [`poll`](Self::poll) from time to time.
///
/// ```no_run
/// # let device = pinbuf::Device::open()?;
/// # let memory = pinbuf::Region::anonymous(1 << 20)?;
/// # let buffer = device.export(&memory)?;
/// let mut watch = pinbuf::Watch::new(&device);
/// watch.add(&buffer)?;
/// loop {
///     for change in watch.poll()? {
///         println!("{:?}", change.discards);
///     }
///     std::thread::sleep(std::time::Duration::from_millis(500));
/// }
/// # #[allow(unreachable_code)]
/// # Ok::<(), pinbuf::Error>(())
/// ```
#[derive(Debug)]
pub struct Watch<D, B> {
    device: D,
    /// The buffers, and what was known of them when they were last asked.
    buffers: Vec<(B, Vec<Discard>)>,
}

/// A buffer of which more, or less, is discarded than before.
#[derive(Debug)]
#[non_exhaustive]
pub struct Change<'w, B> {
    /// The buffer.
    pub buffer: &'w B,
    /// All of its parts that are discarded now.
    pub discards: &'w [Discard],
}

impl<D: Deref<Target = Device>, B: Deref<Target = DmaBuf>> Watch<D, B> {
    /// Watches nothing yet.
    pub fn new(device: D) -> Self {
        Self {
            device,
            buffers: Vec::new(),
        }
    }

    /// Watches a buffer too. What is discarded already is a change.
    ///
    /// # Errors
    ///
    /// As for [`DmaBuf::discarded`]: [`Error::NotADmaBuf`] if the buffer belongs to another exporter. The
    /// buffer is not watched then, and is dropped.
    pub fn add(&mut self, buffer: B) -> Result<()> {
        // Nothing is left to check at the buffer's end, so this takes no time.
        let end = buffer.size()? as u64;
        buffer.discarded_from(&self.device, end)?;
        self.buffers.push((buffer, Vec::new()));
        Ok(())
    }

    /// Watches only those buffers for which `keep` is true.
    pub fn retain(&mut self, mut keep: impl FnMut(&B) -> bool) {
        self.buffers.retain(|(buffer, _)| keep(buffer));
    }

    /// Asks all buffers, and returns those that changed since they were asked before.
    ///
    /// # Errors
    ///
    /// As for [`DmaBuf::discarded`], of the first buffer that has one. Nothing is taken note of then: the
    /// changes of other buffers are returned by the next call that succeeds.
    pub fn poll(&mut self) -> Result<Vec<Change<'_, B>>> {
        let device: &Device = &self.device;
        let now: Vec<_> = self
            .buffers
            .iter()
            .map(|(buffer, _)| buffer.discarded(device))
            .collect::<Result<_>>()?;
        let mut changed = Vec::new();
        for ((buffer, known), discards) in self.buffers.iter_mut().zip(now) {
            if discards != *known {
                *known = discards;
                changed.push(Change {
                    buffer,
                    discards: known,
                });
            }
        }
        Ok(changed)
    }
}
