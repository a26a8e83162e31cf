// SPDX-License-Identifier: MIT OR Apache-2.0

//! Errors, in terms of what the caller did.

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
    /// This user may not open the device. Members of its group, by default `kvm`, may.
    NotPermitted,
    /// The file that was opened is not the device of pinbuf.
    NotPinbuf,
    /// The kernel's module is older than this library and does not know the call.
    Unsupported,
    /// A length is zero, or there is no range.
    Empty,
    /// An address, offset or length in bytes is not a multiple of the page size.
    Misaligned {
        /// The address, offset or length.
        value: u64,
        /// The page size, in bytes.
        align: u64,
    },
    /// There are more ranges than one call accepts.
    TooManyRanges {
        /// The number of ranges.
        count: usize,
        /// The maximum.
        max: usize,
    },
    /// A range ends beyond the address space, or the sum of the lengths overflows.
    TooLarge,
    /// `offset..offset + len` is not within the memory or image, which has `size` bytes.
    OutOfBounds {
        /// Offset of the first byte.
        offset: usize,
        /// Number of bytes.
        len: usize,
        /// Size of the memory or image, in bytes.
        size: usize,
    },
    /// A range is not mapped, not writable, or of a kind that cannot be pinned for the long term; or
    /// its backing store (a pool of huge pages, a tmpfs) is exhausted.
    NotPinnable,
    /// The buffer exceeds the limit on locked memory (`ulimit -l`) and the allowance, or the
    /// machine is out of memory.
    OverLimit {
        /// The buffer's size in bytes.
        bytes: u64,
    },
    /// There is not enough memory, or address space.
    NoMemory,
    /// The pool has too few free huge pages (`/sys/kernel/mm/hugepages`).
    NoHugePages {
        /// Number of bytes that were requested.
        bytes: usize,
        /// Size of a page, in bytes.
        page: usize,
    },
    /// The pages lie where nothing may stay pinned (ZONE_MOVABLE, CMA), and could not be migrated.
    /// Try again later.
    Busy,
    /// A fatal signal arrived.
    Interrupted,
    /// A range does not map the file and offset that the caller expects: the mapping has changed.
    NotTheBacking,
    /// The descriptor that was given with a range is not open.
    BadDescriptor,
    /// The process has no free descriptor (`ulimit -n`), or the system no free file.
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
                "there is no /dev/pinbuf: load the module (modprobe pinbuf)"
            ),
            Self::NotPermitted => {
                write!(
                    f,
                    "no permission to open /dev/pinbuf: join the group that it belongs to"
                )
            }
            Self::NotPinbuf => write!(f, "the file is not the device of pinbuf"),
            Self::Unsupported => write!(f, "the module is older than this library: update it"),
            Self::Empty => write!(f, "a length is zero, or there is no range"),
            Self::Misaligned { value, align } => write!(f, "{value:#x} is not a multiple of {align}"),
            Self::TooManyRanges { count, max } => write!(f, "{count} ranges are more than the maximum of {max}"),
            Self::TooLarge => write!(f, "a range ends beyond the address space"),
            Self::OutOfBounds { offset, len, size } => {
                write!(f, "{len} bytes at offset {offset} are not within {size} bytes")
            }
            Self::NotPinnable => write!(
                f,
                "a range is not mapped, not writable, or of a kind that cannot be pinned, or its \
                 backing store (huge pages, tmpfs) is exhausted"
            ),
            Self::OverLimit { bytes } => write!(
                f,
                "pinning {bytes} bytes exceeds the limit on locked memory (raise `ulimit -l`), or there \
                 is not enough memory"
            ),
            Self::NoMemory => write!(f, "not enough memory or address space"),
            Self::NoHugePages { bytes, page } => write!(
                f,
                "fewer than {} huge pages of {} KiB are free; raise vm.nr_hugepages",
                bytes.div_ceil(*page),
                page / 1024
            ),
            Self::Busy => write!(
                f,
                "pages could not be migrated to memory where they may be pinned; try again later"
            ),
            Self::Interrupted => write!(f, "interrupted by a fatal signal"),
            Self::NotTheBacking => write!(f, "a range does not map the file and offset that were given with it"),
            Self::BadDescriptor => write!(f, "a descriptor is not open"),
            Self::TooManyFiles => write!(f, "no file descriptor is free (raise `ulimit -n`)"),
            Self::Unloading => write!(f, "the module is being unloaded"),
            Self::NotADmaBuf => write!(f, "the descriptor is not a dma-buf, or not one of pinbuf"),
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
    /// The error of a call for which there are no special ones.
    pub(crate) fn system(call: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| match errno {
            Errno::ENOMEM => Self::NoMemory,
            Errno::EMFILE | Errno::ENFILE => Self::TooManyFiles,
            Errno::EBADF => Self::BadDescriptor,
            errno => Self::System { call, errno },
        }
    }

    /// The error of `PINBUF_CREATE`, whose arguments were checked as far as possible before.
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

/// Errors in the description of an [`Image`](crate::Image).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageError {
    /// The width or the height is zero.
    NoPixels,
    /// The layout of this format is not known to this library.
    UnknownFormat(drm_fourcc::DrmFourcc),
    /// The image is tiled or compressed: only linear images have rows.
    NotLinear(u64),
    /// The width or the height is not a multiple of the number that the format's subsampling
    /// requires.
    NotSubsampled {
        /// The width or height, in pixels.
        value: u32,
        /// The number that it has to be a multiple of.
        multiple: u32,
    },
    /// A stride is shorter than a row, or not a multiple of a pixel.
    Stride {
        /// The stride, in bytes.
        stride: usize,
        /// The minimum, in bytes.
        least: usize,
    },
    /// The image does not fit into the buffer.
    TooSmall {
        /// Size of the buffer, in bytes.
        buffer: usize,
        /// Size of the image, in bytes.
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
            Self::NoPixels => write!(f, "the width or the height of the image is zero"),
            Self::UnknownFormat(format) => write!(f, "the layout of {format} is not known"),
            Self::NotLinear(modifier) => write!(f, "modifier {modifier:#x} is not linear"),
            Self::NotSubsampled { value, multiple } => {
                write!(
                    f,
                    "{value} pixels are not a multiple of {multiple}, which the format requires"
                )
            }
            Self::Stride { stride, least } => {
                write!(
                    f,
                    "a stride of {stride} bytes is shorter than a row of {least} bytes, or not whole pixels"
                )
            }
            Self::TooSmall { buffer, image } => {
                write!(
                    f,
                    "the image needs {image} bytes, and the buffer has {buffer}"
                )
            }
            Self::NoSuchRow { plane, row } => {
                write!(f, "the image has no row {row} in plane {plane}")
            }
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
        assert_eq!(
            text,
            "fewer than 3 huge pages of 2048 KiB are free; raise vm.nr_hugepages"
        );
    }
}
