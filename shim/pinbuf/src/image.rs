// SPDX-License-Identifier: MIT OR Apache-2.0

//! The layout of an image in a buffer.

use drm_fourcc::{DrmFourcc, DrmModifier};

use crate::error::ImageError;

type Result<T> = std::result::Result<T, ImageError>;

/// One of an image's planes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plane {
    /// Offset of the plane in the buffer, in bytes.
    pub offset: usize,
    /// Distance from one row to the next, in bytes.
    pub stride: usize,
    /// Number of bytes of a row that hold pixels.
    pub row_bytes: usize,
    /// Number of rows.
    pub rows: u32,
}

/// A linear image in a buffer: size in pixels, format, and where its rows are.
///
/// ```
/// use pinbuf::{DrmFourcc, Image};
///
/// # fn main() -> Result<(), pinbuf::ImageError> {
/// let image = Image::new(DrmFourcc::Nv12, 1920, 1080)?;
/// assert_eq!(image.planes().len(), 2);
/// assert_eq!(image.size(), 1920 * 1080 * 3 / 2);
/// // With rows at multiples of 256 bytes, as some devices require.
/// let image = Image::with_stride_align(DrmFourcc::Xrgb8888, 1000, 500, 256)?;
/// assert_eq!(image.planes()[0].stride, 4096);
/// assert!(image.check_size(4096 * 500).is_ok());
/// assert!(image.check_size(4096 * 499).is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    format: DrmFourcc,
    modifier: DrmModifier,
    width: u32,
    height: u32,
    planes: Vec<Plane>,
}

/// Bytes of a sample, and by what the plane's width and height are divided.
type Layout = (usize, u32, u32);

fn layout(format: DrmFourcc) -> Result<&'static [Layout]> {
    use DrmFourcc::*;
    Ok(match format {
        R8 | C8 | Rgb332 | Bgr233 => &[(1, 1, 1)],
        R16 | Rg88 | Gr88 | Rgb565 | Bgr565 | Xrgb1555 | Argb1555 | Xbgr1555 | Abgr1555
        | Rgbx5551 | Rgba5551 | Bgrx5551 | Bgra5551 | Xrgb4444 | Argb4444 | Xbgr4444 | Abgr4444
        | Rgbx4444 | Rgba4444 | Bgrx4444 | Bgra4444 => &[(2, 1, 1)],
        Rgb888 | Bgr888 => &[(3, 1, 1)],
        Xrgb8888 | Argb8888 | Xbgr8888 | Abgr8888 | Rgbx8888 | Rgba8888 | Bgrx8888 | Bgra8888
        | Xrgb2101010 | Argb2101010 | Xbgr2101010 | Abgr2101010 | Rgbx1010102 | Rgba1010102
        | Bgrx1010102 | Bgra1010102 | Rg1616 | Gr1616 | Ayuv => &[(4, 1, 1)],
        Xrgb16161616f | Argb16161616f | Xbgr16161616f | Abgr16161616f => &[(8, 1, 1)],
        // Two pixels are one sample of four bytes.
        Yuyv | Yvyu | Uyvy | Vyuy => &[(4, 2, 1)],
        Nv12 | Nv21 => &[(1, 1, 1), (2, 2, 2)],
        Nv16 | Nv61 => &[(1, 1, 1), (2, 2, 1)],
        Nv24 | Nv42 => &[(1, 1, 1), (2, 1, 1)],
        P010 | P012 | P016 => &[(2, 1, 1), (4, 2, 2)],
        Yuv420 | Yvu420 => &[(1, 1, 1), (1, 2, 2), (1, 2, 2)],
        Yuv422 | Yvu422 => &[(1, 1, 1), (1, 2, 1), (1, 2, 1)],
        Yuv444 | Yvu444 => &[(1, 1, 1), (1, 1, 1), (1, 1, 1)],
        other => return Err(ImageError::UnknownFormat(other)),
    })
}

impl Image {
    /// An image of `width` by `height` pixels without padding between rows and planes.
    ///
    /// # Errors
    ///
    /// [`ImageError::NoPixels`], [`ImageError::UnknownFormat`], [`ImageError::NotSubsampled`],
    /// [`ImageError::Overflow`].
    pub fn new(format: DrmFourcc, width: u32, height: u32) -> Result<Self> {
        Self::with_stride_align(format, width, height, 1)
    }

    /// The same, with rows at multiples of `align` bytes.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn with_stride_align(
        format: DrmFourcc,
        width: u32,
        height: u32,
        align: usize,
    ) -> Result<Self> {
        let mut planes = Vec::new();
        let mut offset = 0usize;
        for (row_bytes, rows) in rows(format, width, height)? {
            let stride = row_bytes
                .checked_next_multiple_of(align.max(1))
                .ok_or(ImageError::Overflow)?;
            let plane = Plane {
                offset,
                stride,
                row_bytes,
                rows,
            };
            let len = stride
                .checked_mul(rows as usize)
                .ok_or(ImageError::Overflow)?;
            offset = offset.checked_add(len).ok_or(ImageError::Overflow)?;
            planes.push(plane);
        }
        Ok(Self {
            format,
            modifier: DrmModifier::Linear,
            width,
            height,
            planes,
        })
    }

    /// An image with a given offset and stride of each plane, in bytes.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new); [`ImageError::Stride`], [`ImageError::NotLinear`], and
    /// [`ImageError::NoSuchRow`] when the format has another number of planes.
    pub fn with_planes(
        format: DrmFourcc,
        modifier: DrmModifier,
        width: u32,
        height: u32,
        layout: &[(usize, usize)],
    ) -> Result<Self> {
        if !matches!(modifier, DrmModifier::Linear | DrmModifier::Invalid) {
            return Err(ImageError::NotLinear(modifier.into()));
        }
        let rows = rows(format, width, height)?;
        if rows.len() != layout.len() {
            return Err(ImageError::NoSuchRow {
                plane: rows.len().min(layout.len()),
                row: 0,
            });
        }
        let mut planes = Vec::new();
        for ((row_bytes, rows), &(offset, stride)) in rows.into_iter().zip(layout) {
            if stride < row_bytes {
                return Err(ImageError::Stride {
                    stride,
                    least: row_bytes,
                });
            }
            let plane = Plane {
                offset,
                stride,
                row_bytes,
                rows,
            };
            plane.end()?;
            planes.push(plane);
        }
        Ok(Self {
            format,
            modifier,
            width,
            height,
            planes,
        })
    }

    /// The format.
    pub fn format(&self) -> DrmFourcc {
        self.format
    }

    /// The modifier: linear, or unspecified ([`DrmModifier::Invalid`]).
    pub fn modifier(&self) -> DrmModifier {
        self.modifier
    }

    /// Width, in pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height, in pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// The planes.
    pub fn planes(&self) -> &[Plane] {
        &self.planes
    }

    /// Number of bytes from the start of the buffer to the end of the last row.
    pub fn size(&self) -> usize {
        // Each was checked when the image was made.
        self.planes
            .iter()
            .filter_map(|plane| plane.end().ok())
            .max()
            .unwrap_or(0)
    }

    /// Checks that the image fits into a buffer of `buffer` bytes.
    ///
    /// # Errors
    ///
    /// [`ImageError::TooSmall`].
    pub fn check_size(&self, buffer: usize) -> Result<()> {
        let image = self.size();
        if image <= buffer {
            Ok(())
        } else {
            Err(ImageError::TooSmall { buffer, image })
        }
    }

    /// Offset of a row of a plane in the buffer, in bytes.
    ///
    /// # Errors
    ///
    /// [`ImageError::NoSuchRow`].
    pub fn row_offset(&self, plane: usize, row: u32) -> Result<usize> {
        match self.planes.get(plane) {
            Some(found) if row < found.rows => Ok(found.offset + found.stride * row as usize),
            _ => Err(ImageError::NoSuchRow { plane, row }),
        }
    }
}

impl Plane {
    /// Where its last row's pixels end.
    fn end(&self) -> Result<usize> {
        self.stride
            .checked_mul(self.rows as usize - 1)
            .and_then(|rows| rows.checked_add(self.row_bytes))
            .and_then(|len| len.checked_add(self.offset))
            .ok_or(ImageError::Overflow)
    }
}

/// For each plane, the bytes of a row and the number of rows.
fn rows(format: DrmFourcc, width: u32, height: u32) -> Result<Vec<(usize, u32)>> {
    if width == 0 || height == 0 {
        return Err(ImageError::NoPixels);
    }
    let mut rows = Vec::new();
    for &(bytes, by_width, by_height) in layout(format)? {
        for (value, multiple) in [(width, by_width), (height, by_height)] {
            if value % multiple != 0 {
                return Err(ImageError::NotSubsampled { value, multiple });
            }
        }
        let row = (width / by_width) as usize;
        rows.push((
            row.checked_mul(bytes).ok_or(ImageError::Overflow)?,
            height / by_height,
        ));
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let image = Image::new(DrmFourcc::Xrgb8888, 3840, 2160).unwrap();
        assert_eq!(image.size(), 3840 * 2160 * 4);
        assert_eq!(image.row_offset(0, 2159), Ok(3840 * 4 * 2159));
        assert_eq!(
            image.row_offset(0, 2160),
            Err(ImageError::NoSuchRow {
                plane: 0,
                row: 2160
            })
        );
        let yuv = Image::with_stride_align(DrmFourcc::Yuv420, 100, 50, 64).unwrap();
        let places: Vec<_> = yuv
            .planes()
            .iter()
            .map(|p| (p.offset, p.stride, p.rows))
            .collect();
        assert_eq!(places, [(0, 128, 50), (6400, 64, 25), (8000, 64, 25)]);
        assert_eq!(yuv.size(), 8000 + 24 * 64 + 50);
        let packed = Image::new(DrmFourcc::Yuyv, 640, 480).unwrap();
        assert_eq!(packed.planes()[0].stride, 1280);
    }

    /// Bits of a pixel, all planes together, and the number of planes: as the kernel's `drm_fourcc.h` describes each
    /// format.
    #[test]
    fn formats_have_their_bits() {
        use DrmFourcc::*;
        let formats: [(usize, usize, &[DrmFourcc]); 14] = [
            (8, 1, &[R8, C8, Rgb332, Bgr233]),
            (16, 1, &[R16, Rg88, Gr88, Rgb565, Bgr565]),
            (16, 1, &[Xrgb1555, Argb1555, Xbgr1555, Abgr1555]),
            (16, 1, &[Rgbx5551, Rgba5551, Bgrx5551, Bgra5551]),
            (16, 1, &[Xrgb4444, Argb4444, Xbgr4444, Abgr4444]),
            (16, 1, &[Rgbx4444, Rgba4444, Bgrx4444, Bgra4444]),
            (24, 1, &[Rgb888, Bgr888]),
            (32, 1, &[Xrgb8888, Argb8888, Xbgr8888, Abgr8888, Rgbx8888]),
            (32, 1, &[Rgba8888, Bgrx8888, Bgra8888, Rg1616, Gr1616, Ayuv]),
            (32, 1, &[Xrgb2101010, Argb2101010, Xbgr2101010, Abgr2101010]),
            (32, 1, &[Rgbx1010102, Rgba1010102, Bgrx1010102, Bgra1010102]),
            (64, 1, &[Xrgb16161616f, Argb16161616f]),
            (64, 1, &[Xbgr16161616f, Abgr16161616f]),
            (16, 1, &[Yuyv, Yvyu, Uyvy, Vyuy]),
        ];
        let planar: [(usize, usize, &[DrmFourcc]); 7] = [
            (12, 2, &[Nv12, Nv21]),
            (16, 2, &[Nv16, Nv61]),
            (24, 2, &[Nv24, Nv42]),
            (24, 2, &[P010, P012, P016]),
            (12, 3, &[Yuv420, Yvu420]),
            (16, 3, &[Yuv422, Yvu422]),
            (24, 3, &[Yuv444, Yvu444]),
        ];
        let (width, height) = (48, 32);
        for (bits, planes, formats) in formats.into_iter().chain(planar) {
            for &format in formats {
                let image = Image::new(format, width, height).unwrap();
                let bytes = (width * height) as usize * bits / 8;
                assert_eq!(image.size(), bytes, "{format:?}");
                assert_eq!(image.planes().len(), planes, "{format:?}");
                // Samples of colour are beside or below each other, never before those of brightness.
                let first = image.planes()[0];
                assert_eq!((first.offset, first.rows), (0, height), "{format:?}");
            }
        }
        // Colours of half the width have rows of their own for each row of pixels.
        for format in [Nv16, Nv61, Yuv422, Yvu422] {
            let image = Image::new(format, width, height).unwrap();
            assert!(image.planes().iter().all(|plane| plane.rows == height));
        }
    }

    #[test]
    fn checks() {
        let xrgb = DrmFourcc::Xrgb8888;
        assert_eq!(Image::new(xrgb, 0, 5), Err(ImageError::NoPixels));
        let odd = Image::new(DrmFourcc::Nv12, 101, 50);
        assert_eq!(
            odd,
            Err(ImageError::NotSubsampled {
                value: 101,
                multiple: 2
            })
        );
        let linear = DrmModifier::Linear;
        let with = |layout: &[(usize, usize)]| Image::with_planes(xrgb, linear, 10, 10, layout);
        assert!(with(&[(0, 40)]).is_ok());
        assert_eq!(
            with(&[(0, 39)]),
            Err(ImageError::Stride {
                stride: 39,
                least: 40
            })
        );
        assert!(with(&[]).is_err());
        assert_eq!(with(&[(usize::MAX, 40)]), Err(ImageError::Overflow));
        assert_eq!(with(&[(0, usize::MAX)]), Err(ImageError::Overflow));
        let tiled = Image::with_planes(xrgb, DrmModifier::I915_x_tiled, 10, 10, &[(0, 40)]);
        assert!(matches!(tiled, Err(ImageError::NotLinear(_))));
        assert_eq!(with(&[(100, 50)]).unwrap().size(), 100 + 9 * 50 + 40);
    }
}
