// SPDX-License-Identifier: MIT OR Apache-2.0

//! What can go wrong, in words of what the caller did.

use std::fmt;

use nix::errno::Errno;

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// There is no `/dev/pinbuf`: the module is not loaded (`modprobe pinbuf`).
    NoDevice,
    /// The device may not be opened by this user; who may is usually in the group `kvm`.
    NotPermitted,
    /// The file that was opened as the device is another.
    NotPinbuf,
    /// The kernel's module is of another version than this library and does not know the call.
    Unsupported,
    /// A length of zero, or no range at all.
    Empty,
    /// An address, offset or length in bytes is no multiple of the page size.
    Misaligned {
        /// The number in question.
        value: u64,
        /// What it should be a multiple of, bytes.
        align: u64,
    },
    /// More ranges than one call takes.
    TooManyRanges {
        /// How many were given.
        count: usize,
        /// How many may be given.
        max: usize,
    },
    /// A range ends beyond the address space, or the sum of the lengths overflows.
    TooLarge,
    /// `offset..offset + len` is not inside of the memory or image, which has `size` bytes.
    OutOfBounds {
        /// First byte.
        offset: usize,
        /// Bytes.
        len: usize,
        /// Bytes that there are.
        size: usize,
    },
    /// A range is not mapped, not writable, or of a kind that cannot be pinned for long; or what
    /// backs it (a pool of huge pages, a tmpfs) is exhausted.
    NotPinnable,
    /// Over the limit on locked memory (`ulimit -l`) and over the allowance, or out of memory.
    OverLimit {
        /// The buffer's size in bytes.
        bytes: u64,
    },
    /// There is not enough memory, or address space.
    NoMemory,
    /// The pool has not as many free huge pages (`/sys/kernel/mm/hugepages`).
    NoHugePages {
        /// Bytes that were asked for.
        bytes: usize,
        /// Bytes of a page.
        page: usize,
    },
    /// The pages lie where nothing may stay pinned and could not be moved just now. Try again.
    Busy,
    /// A fatal signal arrived.
    Interrupted,
    /// A range does not map the file and offset that were named with it.
    NotTheBacking,
    /// A descriptor that was named with a range is not open.
    BadDescriptor,
    /// No descriptor is free (`ulimit -n`), or no file in the system.
    TooManyFiles,
    /// The module is being unloaded.
    Unloading,
    /// The descriptor is no dma-buf, or for [`DmaBuf::info`](crate::DmaBuf::info) none of pinbuf's.
    NotADmaBuf,
    /// The image description is wrong.
    Image(ImageError),
    /// Another error of a system call.
    System {
        /// The call.
        call: &'static str,
        /// Its error.
        errno: Errno,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDevice => write!(
                f,
                "/dev/pinbuf is missing: load the module (modprobe pinbuf)"
            ),
            Self::NotPermitted => {
                write!(
                    f,
                    "/dev/pinbuf may not be opened: join the group that it belongs to"
                )
            }
            Self::NotPinbuf => write!(f, "the device is not pinbuf's"),
            Self::Unsupported => write!(f, "the kernel's pinbuf is older than this library"),
            Self::Empty => write!(f, "a length of zero, or no range"),
            Self::Misaligned { value, align } => write!(f, "{value:#x} is no multiple of {align}"),
            Self::TooManyRanges { count, max } => write!(f, "{count} ranges, and {max} at most"),
            Self::TooLarge => write!(f, "a range ends beyond the address space"),
            Self::OutOfBounds { offset, len, size } => {
                write!(f, "{len} bytes at {offset} are not inside of {size} bytes")
            }
            Self::NotPinnable => write!(
                f,
                "a range is not mapped, not writable, of a kind that cannot be pinned, or what \
                 backs it is exhausted"
            ),
            Self::OverLimit { bytes } => write!(
                f,
                "pinning {bytes} bytes exceeds the limit on locked memory (ulimit -l), or memory"
            ),
            Self::NoMemory => write!(f, "not enough memory or address space"),
            Self::NoHugePages { bytes, page } => write!(
                f,
                "fewer than {} huge pages of {} KiB are free",
                bytes.div_ceil(*page),
                page / 1024
            ),
            Self::Busy => write!(
                f,
                "pages cannot be moved just now to where they may be pinned"
            ),
            Self::Interrupted => write!(f, "interrupted by a fatal signal"),
            Self::NotTheBacking => write!(f, "a range does not map the file and offset named"),
            Self::BadDescriptor => write!(f, "a descriptor is not open"),
            Self::TooManyFiles => write!(f, "no descriptor is free (ulimit -n)"),
            Self::Unloading => write!(f, "the module is being unloaded"),
            Self::NotADmaBuf => write!(f, "the descriptor is no dma-buf of this kind"),
            Self::Image(error) => error.fmt(f),
            Self::System { call, errno } => write!(f, "{call}: {}", errno.desc()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Image(error) => Some(error),
            Self::System { errno, .. } => Some(errno),
            _ => None,
        }
    }
}

impl From<ImageError> for Error {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

impl Error {
    /// Of a call that has no errors of its own kind.
    pub(crate) fn system(call: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| match errno {
            Errno::ENOMEM => Self::NoMemory,
            Errno::EMFILE | Errno::ENFILE => Self::TooManyFiles,
            Errno::EBADF => Self::BadDescriptor,
            errno => Self::System { call, errno },
        }
    }

    /// Of `PINBUF_CREATE`, whose arguments were checked for what can be told beforehand.
    pub(crate) fn of_create(errno: Errno, bytes: u64) -> Self {
        match errno {
            Errno::EOVERFLOW => Self::TooLarge,
            Errno::EFAULT => Self::NotPinnable,
            Errno::ENOMEM => Self::OverLimit { bytes },
            Errno::EBUSY => Self::Busy,
            Errno::EINTR => Self::Interrupted,
            Errno::EAGAIN => Self::NotTheBacking,
            Errno::EBADF => Self::BadDescriptor,
            Errno::EMFILE | Errno::ENFILE => Self::TooManyFiles,
            Errno::ENODEV => Self::Unloading,
            Errno::ENOTTY | Errno::E2BIG => Self::Unsupported,
            errno => Self::System {
                call: "PINBUF_CREATE",
                errno,
            },
        }
    }
}

/// What is wrong with an [`Image`](crate::Image).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageError {
    /// The width or the height is zero.
    NoPixels,
    /// The layout of this format is not known here.
    UnknownFormat(drm_fourcc::DrmFourcc),
    /// Only linear images have rows that can be described; this one is tiled or compressed.
    NotLinear(u64),
    /// The width or the height is no multiple of what the format's subsampling needs.
    NotSubsampled {
        /// The number in question, pixels.
        value: u32,
        /// What it should be a multiple of.
        multiple: u32,
    },
    /// A stride is shorter than a row, or no multiple of a pixel.
    Stride {
        /// The stride given, bytes.
        stride: usize,
        /// The least that is needed, bytes.
        least: usize,
    },
    /// The image does not fit.
    TooSmall {
        /// Bytes of the buffer.
        buffer: usize,
        /// Bytes that the image takes.
        image: usize,
    },
    /// The image has no such plane or row.
    NoSuchRow {
        /// The plane.
        plane: usize,
        /// The row.
        row: u32,
    },
    /// The image's size overflows.
    Overflow,
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPixels => write!(f, "an image without pixels"),
            Self::UnknownFormat(format) => write!(f, "the layout of {format} is not known"),
            Self::NotLinear(modifier) => write!(f, "modifier {modifier:#x} is not linear"),
            Self::NotSubsampled { value, multiple } => {
                write!(
                    f,
                    "{value} pixels are no multiple of {multiple}, as the format needs"
                )
            }
            Self::Stride { stride, least } => {
                write!(
                    f,
                    "a stride of {stride} bytes where a row takes {least}, in whole pixels"
                )
            }
            Self::TooSmall { buffer, image } => {
                write!(f, "a buffer of {buffer} bytes for an image of {image}")
            }
            Self::NoSuchRow { plane, row } => write!(f, "no row {row} in plane {plane}"),
            Self::Overflow => write!(f, "the image's size overflows"),
        }
    }
}

impl std::error::Error for ImageError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_the_caller_did() {
        assert_eq!(Error::of_create(Errno::EFAULT, 1), Error::NotPinnable);
        assert_eq!(
            Error::of_create(Errno::ENOMEM, 7),
            Error::OverLimit { bytes: 7 }
        );
        assert_eq!(
            Error::of_create(Errno::EPERM, 1),
            Error::System {
                call: "PINBUF_CREATE",
                errno: Errno::EPERM
            }
        );
        let text = Error::NoHugePages {
            bytes: 5 << 20,
            page: 2 << 20,
        }
        .to_string();
        assert_eq!(text, "fewer than 3 huge pages of 2048 KiB are free");
    }
}
