// SPDX-License-Identifier: MIT OR Apache-2.0

//! As much of Vulkan as it takes to draw into memory that can be handed out as a dma-buf.
//!
//! Nothing is destroyed by hand: the process ends soon.

use std::ffi::CStr;
use std::os::fd::{FromRawFd, OwnedFd};

use anyhow::{ensure, Context, Result};
use ash::{ext, khr, vk, Entry};

/// What kind of descriptor is asked for.
pub const DMA_BUF: vk::ExternalMemoryHandleTypeFlags =
    vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;

/// Mesa's software renderer, opened.
pub struct Gpu {
    // Dropped last: it unloads the library that all the rest calls.
    instance: ash::Instance,
    device: ash::Device,
    export: khr::external_memory_fd::Device,
    physical: vk::PhysicalDevice,
    queue: vk::Queue,
    pool: vk::CommandPool,
    _entry: Entry,
}

/// Memory of the renderer's.
pub struct Allocation {
    /// Its name in Vulkan.
    pub memory: vk::DeviceMemory,
    /// Bytes.
    pub size: u64,
}

impl Gpu {
    /// Opens it. `None` if it cannot hand out dma-bufs.
    pub fn open() -> Result<Option<Self>> {
        // SAFETY: the system's Vulkan loader, whose initialisers are sound.
        let entry = unsafe { Entry::load() }.context("loading libvulkan")?;
        let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
        let info = vk::InstanceCreateInfo::default().application_info(&application);
        // SAFETY: the structures live as long as the call.
        let instance = unsafe { entry.create_instance(&info, None) }.context("an instance")?;
        let physical = Self::renderer(&instance)?;
        if !Self::exports(&instance, physical)? {
            return Ok(None);
        }
        let extensions = [
            ext::external_memory_dma_buf::NAME.as_ptr(),
            khr::external_memory_fd::NAME.as_ptr(),
        ];
        let queues = [vk::DeviceQueueCreateInfo::default().queue_priorities(&[1.0])];
        let mut rendering =
            vk::PhysicalDeviceDynamicRenderingFeatures::default().dynamic_rendering(true);
        let info = vk::DeviceCreateInfo::default()
            .queue_create_infos(&queues)
            .enabled_extension_names(&extensions)
            .push_next(&mut rendering);
        // SAFETY: the structures live as long as the call, and the extensions were offered.
        let device =
            unsafe { instance.create_device(physical, &info, None) }.context("a device")?;
        // SAFETY: the first queue of the first family was asked for above.
        let queue = unsafe { device.get_device_queue(0, 0) };
        let info = vk::CommandPoolCreateInfo::default();
        // SAFETY: family 0 has a queue.
        let pool = unsafe { device.create_command_pool(&info, None) }.context("a command pool")?;
        Ok(Some(Self {
            export: khr::external_memory_fd::Device::new(&instance, &device),
            instance,
            device,
            physical,
            queue,
            pool,
            _entry: entry,
        }))
    }

    /// Finds the software renderer, whose first queues can draw and copy.
    fn renderer(instance: &ash::Instance) -> Result<vk::PhysicalDevice> {
        // SAFETY: the instance lives.
        let all = unsafe { instance.enumerate_physical_devices() }.context("renderers")?;
        for physical in all {
            // SAFETY: one of this instance's.
            let properties = unsafe { instance.get_physical_device_properties(physical) };
            let name = properties.device_name_as_c_str()?.to_string_lossy();
            if properties.device_type == vk::PhysicalDeviceType::CPU {
                println!("renderer: {name}");
                return Ok(physical);
            }
        }
        anyhow::bail!("there is no software renderer")
    }

    /// Can buffers of this renderer be exported as dma-bufs?
    fn exports(instance: &ash::Instance, physical: vk::PhysicalDevice) -> Result<bool> {
        // SAFETY: one of this instance's.
        let offered = unsafe { instance.enumerate_device_extension_properties(physical) }
            .context("extensions")?;
        let has = |name: &CStr| {
            offered
                .iter()
                .any(|found| found.extension_name_as_c_str() == Ok(name))
        };
        if !has(ext::external_memory_dma_buf::NAME) || !has(khr::external_memory_fd::NAME) {
            return Ok(false);
        }
        let info = vk::PhysicalDeviceExternalBufferInfo::default()
            .usage(vk::BufferUsageFlags::TRANSFER_DST)
            .handle_type(DMA_BUF);
        let mut properties = vk::ExternalBufferProperties::default();
        // SAFETY: the structures live as long as the call.
        unsafe {
            instance.get_physical_device_external_buffer_properties(
                physical,
                &info,
                &mut properties,
            );
        }
        let features = properties
            .external_memory_properties
            .external_memory_features;
        Ok(features.contains(vk::ExternalMemoryFeatureFlags::EXPORTABLE))
    }

    /// A buffer, in memory that can be handed out or in ordinary memory.
    pub fn buffer(&self, size: u64, exportable: bool) -> Result<(vk::Buffer, Allocation)> {
        let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(DMA_BUF);
        let mut info = vk::BufferCreateInfo::default()
            .size(size)
            .usage(vk::BufferUsageFlags::TRANSFER_DST | vk::BufferUsageFlags::TRANSFER_SRC);
        if exportable {
            info = info.push_next(&mut external);
        }
        // SAFETY: the structures live as long as the call.
        let buffer = unsafe { self.device.create_buffer(&info, None) }.context("a buffer")?;
        // SAFETY: this device's.
        let needs = unsafe { self.device.get_buffer_memory_requirements(buffer) };
        let allocation = self.allocate(needs, exportable)?;
        // SAFETY: both are new, and the memory is as large as was asked for.
        unsafe { self.device.bind_buffer_memory(buffer, allocation.memory, 0) }
            .context("binding a buffer")?;
        Ok((buffer, allocation))
    }

    /// An image to draw into, row after row in memory that can be handed out.
    pub fn image(&self, width: u32, height: u32, format: vk::Format) -> Result<Picture> {
        let usage = vk::ImageUsageFlags::COLOR_ATTACHMENT;
        let mut external =
            vk::PhysicalDeviceExternalImageFormatInfo::default().handle_type(DMA_BUF);
        let query = vk::PhysicalDeviceImageFormatInfo2::default()
            .format(format)
            .ty(vk::ImageType::TYPE_2D)
            .tiling(vk::ImageTiling::LINEAR)
            .usage(usage)
            .push_next(&mut external);
        let mut answer = vk::ImageFormatProperties2::default();
        // SAFETY: the structures live as long as the call.
        unsafe {
            self.instance.get_physical_device_image_format_properties2(
                self.physical,
                &query,
                &mut answer,
            )
        }
        .context("images in dma-bufs")?;
        let mut external = vk::ExternalMemoryImageCreateInfo::default().handle_types(DMA_BUF);
        let info = vk::ImageCreateInfo::default()
            .image_type(vk::ImageType::TYPE_2D)
            .format(format)
            .extent(vk::Extent3D {
                width,
                height,
                depth: 1,
            })
            .mip_levels(1)
            .array_layers(1)
            .samples(vk::SampleCountFlags::TYPE_1)
            .tiling(vk::ImageTiling::LINEAR)
            .usage(usage)
            .push_next(&mut external);
        // SAFETY: the structures live as long as the call, and the combination is supported.
        let image = unsafe { self.device.create_image(&info, None) }.context("an image")?;
        // SAFETY: this device's.
        let needs = unsafe { self.device.get_image_memory_requirements(image) };
        let allocation = self.allocate(needs, true)?;
        // SAFETY: both are new, and the memory is as large as was asked for.
        unsafe { self.device.bind_image_memory(image, allocation.memory, 0) }
            .context("binding an image")?;
        let color = vk::ImageSubresource::default().aspect_mask(vk::ImageAspectFlags::COLOR);
        // SAFETY: the image is linear.
        let layout = unsafe { self.device.get_image_subresource_layout(image, color) };
        let info = vk::ImageViewCreateInfo::default()
            .image(image)
            .view_type(vk::ImageViewType::TYPE_2D)
            .format(format)
            .subresource_range(COLOR);
        // SAFETY: the image is this device's, and bound.
        let view = unsafe { self.device.create_image_view(&info, None) }.context("a view")?;
        Ok(Picture {
            image,
            view,
            allocation,
            offset: layout.offset,
            pitch: layout.row_pitch,
        })
    }

    fn allocate(&self, needs: vk::MemoryRequirements, exportable: bool) -> Result<Allocation> {
        ensure!(needs.memory_type_bits != 0, "no memory will do");
        let mut export = vk::ExportMemoryAllocateInfo::default().handle_types(DMA_BUF);
        let mut info = vk::MemoryAllocateInfo::default()
            .allocation_size(needs.size)
            .memory_type_index(needs.memory_type_bits.trailing_zeros());
        if exportable {
            info = info.push_next(&mut export);
        }
        // SAFETY: the structures live as long as the call.
        let memory = unsafe { self.device.allocate_memory(&info, None) }.context("memory")?;
        Ok(Allocation {
            memory,
            size: needs.size,
        })
    }

    /// Hands memory out.
    pub fn export(&self, allocation: &Allocation) -> Result<OwnedFd> {
        let info = vk::MemoryGetFdInfoKHR::default()
            .memory(allocation.memory)
            .handle_type(DMA_BUF);
        // SAFETY: the memory was allocated for that.
        let fd = unsafe { self.export.get_memory_fd(&info) }.context("exporting memory")?;
        // SAFETY: the descriptor is the caller's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Copies the first bytes of memory that is not handed out.
    pub fn read(&self, allocation: &Allocation, data: &mut [u8]) -> Result<()> {
        assert!(data.len() as u64 <= allocation.size);
        let size = vk::WHOLE_SIZE;
        let flags = vk::MemoryMapFlags::empty();
        // SAFETY: the memory is this device's, and not mapped.
        let from = unsafe { self.device.map_memory(allocation.memory, 0, size, flags) }
            .context("mapping memory")?;
        // SAFETY: mapped as a whole, which is not shorter than `data`, and no work is queued.
        unsafe {
            std::ptr::copy_nonoverlapping(from.cast::<u8>(), data.as_mut_ptr(), data.len());
        }
        // SAFETY: mapped above, and nothing points into it any more.
        unsafe { self.device.unmap_memory(allocation.memory) };
        Ok(())
    }

    /// Gives memory back; what was handed out of it stays.
    pub fn free(&self, allocation: Allocation) {
        // SAFETY: this device's, and no work is queued that uses it.
        unsafe { self.device.free_memory(allocation.memory, None) };
    }

    /// Records commands, runs them, and waits for their end.
    pub fn run(&self, record: impl FnOnce(&ash::Device, vk::CommandBuffer)) -> Result<()> {
        let info = vk::CommandBufferAllocateInfo::default()
            .command_pool(self.pool)
            .command_buffer_count(1);
        // SAFETY: the pool is this device's.
        let commands =
            unsafe { self.device.allocate_command_buffers(&info) }.context("commands")?;
        let info = vk::CommandBufferBeginInfo::default()
            .flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
        // SAFETY: a new command buffer.
        unsafe { self.device.begin_command_buffer(commands[0], &info) }?;
        record(&self.device, commands[0]);
        // Makes everything that was written visible to any reader of the memory.
        let barrier = [vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::MEMORY_WRITE)
            .dst_access_mask(vk::AccessFlags::HOST_READ)];
        // SAFETY: recording, outside of rendering.
        unsafe {
            self.device.cmd_pipeline_barrier(
                commands[0],
                vk::PipelineStageFlags::ALL_COMMANDS,
                vk::PipelineStageFlags::HOST,
                vk::DependencyFlags::empty(),
                &barrier,
                &[],
                &[],
            );
        }
        // SAFETY: recording.
        unsafe { self.device.end_command_buffer(commands[0]) }?;
        let work = [vk::SubmitInfo::default().command_buffers(&commands)];
        // SAFETY: recorded completely, and what it names lives until the wait is over.
        unsafe {
            self.device
                .queue_submit(self.queue, &work, vk::Fence::null())
        }?;
        // SAFETY: this device's, used by this thread alone.
        unsafe { self.device.queue_wait_idle(self.queue) }.context("waiting for the renderer")
    }
}

/// An image and where its rows are.
pub struct Picture {
    /// Its name in Vulkan.
    pub image: vk::Image,
    /// What is drawn to.
    pub view: vk::ImageView,
    /// Its memory.
    pub allocation: Allocation,
    /// Where the first row begins, bytes.
    pub offset: u64,
    /// From one row to the next, bytes.
    pub pitch: u64,
}

/// All of an image.
pub const COLOR: vk::ImageSubresourceRange = vk::ImageSubresourceRange {
    aspect_mask: vk::ImageAspectFlags::COLOR,
    base_mip_level: 0,
    level_count: 1,
    base_array_layer: 0,
    layer_count: 1,
};
