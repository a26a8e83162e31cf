// SPDX-License-Identifier: GPL-2.0

//! A misc device that supports only `ioctl`, and whose open files have no state.
//!
//! `kernel::miscdevice` of Linux 7.2 does not set `file_operations.owner` (7.3 does), so that a
//! module could be unloaded while a file is open. This abstraction sets it on every version.
//!
//! C header: [`include/linux/miscdevice.h`](srctree/include/linux/miscdevice.h).

use core::marker::PhantomData;
use kernel::{
    bindings,
    error::{
        from_result,
        to_result, //
    },
    ffi::{
        c_long,
        c_uint,
        c_ulong, //
    },
    prelude::*,
    types::Opaque,
    uaccess::UserPtr, //
};

/// The ioctls of a device.
pub(crate) trait Calls: Sync + 'static {
    /// Handles the ioctl `command` of the current task. `argument` may come from a 32-bit or a
    /// 64-bit caller. Returns the result of the system call.
    fn ioctl(command: u32, argument: UserPtr) -> Result<c_long>;
}

/// A registered misc device, `/dev/NAME`.
///
/// # Invariants
///
/// `device` is registered, and refers to `operations`.
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<C: Calls> {
    operations: KBox<bindings::file_operations>,
    #[pin]
    device: Opaque<bindings::miscdevice>,
    calls: PhantomData<fn() -> C>,
}

// SAFETY: A device may be deregistered by any task.
unsafe impl<C: Calls> Send for Registration<C> {}
// SAFETY: A shared reference gives no access to any field.
unsafe impl<C: Calls> Sync for Registration<C> {}

impl<C: Calls> Registration<C> {
    /// Registers the device. Its mode is 0600, the default of new devices, until udev changes it.
    pub(crate) fn new(
        module: &'static ThisModule,
        name: &'static CStr,
    ) -> impl PinInit<Self, Error> {
        let operations = bindings::file_operations {
            owner: module.as_ptr(),
            unlocked_ioctl: Some(ioctl::<C>),
            compat_ioctl: bindings::compat_ptr_ioctl,
            ..pin_init::zeroed()
        };
        try_pin_init!(Self {
            operations: KBox::new(operations, GFP_KERNEL)?,
            device <- {
                let operations = &raw const **operations;
                Opaque::try_ffi_init(move |slot: *mut bindings::miscdevice| {
                    let device = bindings::miscdevice {
                        minor: bindings::MISC_DYNAMIC_MINOR as c_int,
                        name: name.as_char_ptr(),
                        fops: operations,
                        ..pin_init::zeroed()
                    };
                    // SAFETY: `slot` is valid for writing.
                    unsafe { slot.write(device) };
                    // SAFETY: `slot` is pinned, and `slot`, `name` and `operations` live until the
                    // device is deregistered.
                    to_result(unsafe { bindings::misc_register(slot) })
                })
            },
            calls: PhantomData,
        }? Error)
    }
}

#[pinned_drop]
impl<C: Calls> PinnedDrop for Registration<C> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered, by the type invariant. No file is open: each open file holds a
        // reference to the module.
        unsafe { bindings::misc_deregister(self.device.get()) };
    }
}

/// # Safety
///
/// Called by the kernel, on behalf of a task.
unsafe extern "C" fn ioctl<C: Calls>(
    _file: *mut bindings::file,
    command: c_uint,
    argument: c_ulong,
) -> c_long {
    from_result(|| C::ioctl(command, UserPtr::from_addr(argument)))
}
