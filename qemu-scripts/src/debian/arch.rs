// SPDX-License-Identifier: MIT OR Apache-2.0

//! The architectures of guests, and the names that each tool has for them.

/// The architecture of a guest, its kernel and its programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// The host's own: only on it are trees made and modules compiled.
    Amd64,
    /// Cross-compiled on the host.
    Arm64,
}

impl Arch {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Amd64, Self::Arm64];

    /// Debian's name.
    pub fn debian(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// The name in the kernel's build.
    pub fn kbuild(self) -> &'static str {
        match self {
            Self::Amd64 => "x86",
            Self::Arm64 => "arm64",
        }
    }

    /// The prefix of the cross compiler's programs.
    pub fn gnu(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-linux-gnu",
            Self::Arm64 => "aarch64-linux-gnu",
        }
    }

    /// The prefix of the compiler for 32-bit processes on the same kernel.
    pub fn gnu32(self) -> &'static str {
        match self {
            Self::Amd64 => "i686-linux-gnu",
            Self::Arm64 => "arm-linux-gnueabihf",
        }
    }

    /// The target of rustc.
    pub fn rust(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// Programs run on the host as they are.
    pub fn is_native(self) -> bool {
        self == Self::Amd64
    }

    /// What a name of something that is made for this architecture ends with.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Amd64 => "",
            Self::Arm64 => "-arm64",
        }
    }
}
