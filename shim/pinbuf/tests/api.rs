// SPDX-License-Identifier: MIT OR Apache-2.0

//! What programs expect of a library's types. Most of it is tested by being compiled.

use std::error::Error as _;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use pinbuf::{
    Change, CpuAccess, Device, Discard, DmaBuf, DrmFourcc, Error, Image, ImageError, Info, Mapping,
    Query, Region, RegionSlice, SyncGuard, Watch,
};

#[test]
fn everything_is_send_and_sync() {
    fn both<T: Send + Sync>() {}

    both::<Device>();
    both::<DmaBuf>();
    both::<Mapping<'_>>();
    both::<CpuAccess<'_>>();
    both::<SyncGuard<'_>>();
    both::<Region>();
    both::<RegionSlice<'_>>();
    both::<Watch<Arc<Device>, Arc<DmaBuf>>>();
    both::<Change<'_, Arc<DmaBuf>>>();
    both::<Discard>();
    both::<Image>();
    both::<Info>();
    both::<Query>();
    both::<Error>();
    both::<ImageError>();
}

/// There is no `From<BorrowedFd>`: to own a borrowed descriptor means to copy it, which can fail, and a
/// descriptor of another kind of file is an error.
#[test]
fn descriptors_are_lent_given_and_taken() {
    fn lent<T: AsFd>() {}
    fn given<T: Into<OwnedFd>>() {}
    fn taken<'a, T: TryFrom<OwnedFd, Error = Error> + TryFrom<BorrowedFd<'a>, Error = Error>>() {}

    lent::<DmaBuf>();
    lent::<Device>();
    given::<DmaBuf>();
    given::<Device>();
    taken::<DmaBuf>();
    taken::<Device>();

    let other = File::open("/dev/null").unwrap();
    let errors = (
        DmaBuf::try_from(other.as_fd()).unwrap_err(),
        Device::try_from(other.as_fd()).unwrap_err(),
    );
    assert_eq!(errors, (Error::NotADmaBuf, Error::NotPinbuf));
    let owned = OwnedFd::from(other);
    assert_eq!(DmaBuf::try_from(owned).unwrap_err(), Error::NotADmaBuf);
}

#[test]
fn errors_have_a_source() {
    fn error<T: std::error::Error + Clone + Eq + Send + Sync + 'static>() {}

    error::<Error>();
    error::<ImageError>();

    // What a system call returned: memfds have no names of this length.
    let call = Region::memfd(&"x".repeat(1000), 1, None).unwrap_err();
    let source = call
        .source()
        .and_then(|source| source.downcast_ref::<nix::Error>());
    assert_eq!(source, Some(&nix::Error::EINVAL), "{call:?}");

    // What is wrong with an image.
    let image = Image::new(DrmFourcc::Xrgb8888, 0, 1).unwrap_err();
    let wrapped = Error::from(image.clone());
    let source = wrapped
        .source()
        .and_then(|source| source.downcast_ref::<ImageError>());
    assert_eq!(source, Some(&image));

    // One that this library found itself has none.
    assert!(Error::Empty.source().is_none());
}
