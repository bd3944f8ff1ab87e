//! NCCL's functions, found when a communicator is first made. A table of our own: the bindings at hand panic where the library or
//! a function is missing, and look for `libnccl.so` alone, where packages install `libnccl.so.2`.

use libloading::Library as File;
use model::fault::{Fault, FaultKind};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::ManuallyDrop;
use std::sync::Arc;

/// In the order in which they are looked for.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// The oldest NCCL that takes [`Config`] as it is written here.
const LEAST: Version = Version(21800);
/// The oldest that shrinks.
const SHRINKS: Version = Version(22700);

/// A communicator, NCCL's `ncclComm_t`.
pub type Handle = *mut c_void;
/// A CUDA stream.
pub type Stream = *mut c_void;

/// How members of a new communicator find each other.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; UniqueId::BYTES]);

impl UniqueId {
    pub const BYTES: usize = 128;
}

/// `ncclConfig_t` of 2.18: later versions complete what an older one lacks.
#[repr(C)]
pub struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    ctas_least: c_int,
    ctas_most: c_int,
    network: *const c_char,
    split_share: c_int,
}

impl Config {
    /// Calls return at once, and [`Functions::async_error`] says when they are done.
    pub fn non_blocking() -> Config {
        const UNSAID: c_int = c_int::MIN;
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: LEAST.0 as c_uint,
            blocking: 0,
            cga_cluster_size: UNSAID,
            ctas_least: UNSAID,
            ctas_most: UNSAID,
            network: std::ptr::null(),
            split_share: UNSAID,
        }
    }
}

/// As NCCL counts: 2.32.3 is 23203.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub i32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0 / 10_000, self.0 / 100 % 100, self.0 % 100)
    }
}

/// `ncclResult_t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code(pub c_int);

impl Code {
    pub const SUCCESS: Code = Code(0);
    pub const IN_PROGRESS: Code = Code(7);

    fn name(self) -> String {
        const NAMES: [&str; 9] = [
            "ncclSuccess",
            "ncclUnhandledCudaError",
            "ncclSystemError",
            "ncclInternalError",
            "ncclInvalidArgument",
            "ncclInvalidUsage",
            "ncclRemoteError",
            "ncclInProgress",
            "ncclTimeout",
        ];
        let known = usize::try_from(self.0).ok().and_then(|code| NAMES.get(code));
        known.map_or_else(|| format!("nccl result {}", self.0), |name| (*name).to_string())
    }

    fn kind(self) -> FaultKind {
        match self.0 {
            6 => FaultKind::RankLost,
            8 => FaultKind::Timeout,
            _ => FaultKind::Internal,
        }
    }
}

/// NCCL's numbers for what is moved and how it is reduced.
pub const BYTES: c_int = 0;
pub const FLOAT32: c_int = 7;
pub const SUM: c_int = 0;
/// `ncclCommShrink` first ends what runs.
pub const SHRINK_ABORT: c_int = 1;

macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// Each as NCCL's manual says; all of them may be called by one thread at a time for a communicator.
        pub struct Functions {
            $(pub $field: unsafe extern "C" fn($($argument),*) -> $result,)*
            pub shrink: Option<Shrink>,
        }

        impl Functions {
            fn of(file: &File, name: &str) -> Result<Functions, Fault> {
                Ok(Functions {
                    // SAFETY: the type is that of NCCL's header.
                    $($field: unsafe { symbol(file, name, $name) }?,)*
                    // SAFETY: the same.
                    shrink: unsafe { file.get::<Shrink>("ncclCommShrink") }.ok().map(|found| *found),
                })
            }
        }
    };
}

type Shrink = unsafe extern "C" fn(Handle, *mut c_int, c_int, *mut Handle, *mut Config, c_int) -> c_int;

functions! {
    last_error = "ncclGetLastError": fn(Handle) -> *const c_char;
    unique_id = "ncclGetUniqueId": fn(*mut UniqueId) -> c_int;
    init = "ncclCommInitRankConfig": fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int;
    async_error = "ncclCommGetAsyncError": fn(Handle, *mut c_int) -> c_int;
    abort = "ncclCommAbort": fn(Handle) -> c_int;
    finalize = "ncclCommFinalize": fn(Handle) -> c_int;
    destroy = "ncclCommDestroy": fn(Handle) -> c_int;
    group_start = "ncclGroupStart": fn() -> c_int;
    group_end = "ncclGroupEnd": fn() -> c_int;
    all_reduce = "ncclAllReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Stream) -> c_int;
    all_gather = "ncclAllGather": fn(*const c_void, *mut c_void, usize, c_int, Handle, Stream) -> c_int;
    send = "ncclSend": fn(*const c_void, usize, c_int, c_int, Handle, Stream) -> c_int;
    receive = "ncclRecv": fn(*mut c_void, usize, c_int, c_int, Handle, Stream) -> c_int;
}

/// # Safety
/// `T` is the function's type.
unsafe fn symbol<T: Copy>(file: &File, library: &str, name: &str) -> Result<T, Fault> {
    // SAFETY: the caller vouches for the type.
    let found = unsafe { file.get::<T>(name) };
    found.map(|found| *found).map_err(|_| incompatible(format!("{library} has no {name}")))
}

fn incompatible(text: String) -> Fault {
    Fault::new(FaultKind::Incompatible, text)
}

/// The loaded library. It stays until the process ends: threads of its own run in it.
pub struct Library {
    _file: ManuallyDrop<File>,
    name: &'static str,
    version: Version,
    functions: Functions,
}

impl Library {
    /// A fault that says which version there is where it is too old, or what was looked for.
    pub fn open() -> Result<Arc<Library>, Fault> {
        // SAFETY: loading NCCL runs its initialisers alone.
        let mut tried = NAMES.iter().map(|name| (*name, unsafe { File::new(*name) }));
        let Some((name, Ok(file))) = tried.find(|(_, file)| file.is_ok()) else {
            return Err(incompatible(format!("no NCCL ({}) on this host", NAMES.join(", "))));
        };
        let mut version = 0;
        // SAFETY: the function's type is that of NCCL's header; it writes to a live variable.
        let code = Code(unsafe {
            symbol::<unsafe extern "C" fn(*mut c_int) -> c_int>(&file, name, "ncclGetVersion")?(&mut version)
        });
        let version = Version(version);
        if code != Code::SUCCESS || version < LEAST {
            return Err(incompatible(format!("NCCL is {version}, {LEAST} is needed")));
        }
        let functions = Functions::of(&file, name)?;
        Ok(Arc::new(Library { _file: ManuallyDrop::new(file), name, version, functions }))
    }

    /// The file's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    pub fn version(&self) -> Version {
        self.version
    }

    pub(super) fn functions(&self) -> &Functions {
        &self.functions
    }

    pub(super) fn shrink(&self) -> Result<Shrink, Fault> {
        let needed = || incompatible(format!("NCCL is {}, {SHRINKS} is needed to shrink", self.version));
        self.functions.shrink.filter(|_| self.version >= SHRINKS).ok_or_else(needed)
    }

    /// What one member makes and all members need.
    pub fn unique_id(&self) -> Result<UniqueId, Fault> {
        let mut id = UniqueId([0; UniqueId::BYTES]);
        // SAFETY: writes to a live variable.
        let code = Code(unsafe { (self.functions.unique_id)(&mut id) });
        if code == Code::SUCCESS { Ok(id) } else { Err(self.fault("ncclGetUniqueId", code)) }
    }

    /// What a failed call left to say.
    pub(super) fn fault(&self, what: &str, code: Code) -> Fault {
        // SAFETY: NCCL ignores the communicator, and gives a text of its own that stays.
        let said = unsafe { (self.functions.last_error)(std::ptr::null_mut()) };
        // SAFETY: the text ends with a zero.
        let said = if said.is_null() { "".into() } else { unsafe { CStr::from_ptr(said) }.to_string_lossy() };
        let said = if said.trim().is_empty() { String::new() } else { format!(" ({})", said.trim()) };
        Fault::new(code.kind(), format!("{what}: {}{said}", code.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_said_as_people_say_them() {
        assert_eq!([Version(23203), LEAST].map(|v| v.to_string()), ["2.32.3", "2.18.0"]);
    }

    #[test]
    fn results_are_called_by_their_names() {
        assert_eq!(Code(6).name(), "ncclRemoteError");
        assert_eq!(Code(42).name(), "nccl result 42");
        assert_eq!((Code(6).kind(), Code(8).kind()), (FaultKind::RankLost, FaultKind::Timeout));
    }

    #[test]
    fn the_configuration_is_laid_out_as_the_header_says() {
        assert_eq!((size_of::<Config>(), std::mem::offset_of!(Config, network)), (48, 32));
        assert_eq!(std::mem::offset_of!(Config, split_share), 40);
    }
}
