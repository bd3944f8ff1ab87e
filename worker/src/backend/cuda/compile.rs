//! Kernel text to an image for one architecture, by NVRTC.

use super::texts::{HEADERS, OPTIONS, Text, architecture};
use cudarc::nvrtc::sys;
use model::fault::{Fault, FaultKind};
use std::ffi::{CString, c_char};
use std::ptr::null_mut;

/// A source's code for one architecture.
pub struct Compiled {
    /// What a driver loads: a cubin.
    pub image: Vec<u8>,
    /// What the compiler says of it, with each kernel's registers and stack.
    pub log: String,
}

struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `nvrtcCreateProgram`, destroyed once.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn text(text: &str) -> Result<CString, Fault> {
    CString::new(text).map_err(|e| Fault::new(FaultKind::Internal, format!("kernel text: {e}")))
}

fn pointers(texts: &[CString]) -> Vec<*const c_char> {
    texts.iter().map(|t| t.as_ptr()).collect()
}

/// Compiles `source` for GPUs of `capability`.
pub fn compile(source: &Text, capability: u32) -> Result<Compiled, Fault> {
    // SAFETY: asks the loader alone.
    if !unsafe { sys::is_culib_present() } {
        let why = "no NVRTC (libnvrtc.so) to compile kernels for this GPU with";
        return Err(Fault::new(FaultKind::Incompatible, why));
    }
    let (body, name) = (text(source.text)?, text(source.name)?);
    let texts = HEADERS.iter().map(|h| text(h.text)).collect::<Result<Vec<_>, _>>()?;
    let names = HEADERS.iter().map(|h| text(h.name)).collect::<Result<Vec<_>, _>>()?;
    let architecture = format!("--gpu-architecture={}", architecture(capability));
    let options = OPTIONS.iter().chain([&architecture.as_str()]).map(|o| text(o)).collect::<Result<Vec<_>, _>>()?;
    let mut program = Program(null_mut());
    let (texts, names, options) = (pointers(&texts), pointers(&names), pointers(&options));
    let refuse = |what: &str, code: sys::nvrtcResult, log: &str| {
        Fault::new(FaultKind::Incompatible, format!("{what} of {}: {code:?} {log}", source.name))
    };
    let ok = |what: &str, code: sys::nvrtcResult| match code {
        sys::nvrtcResult::NVRTC_SUCCESS => Ok(()),
        code => Err(refuse(what, code, "")),
    };
    // SAFETY: all texts end with a zero and outlive the program; sizes are asked before what has them is read.
    unsafe {
        let (count, texts, names) = (HEADERS.len() as i32, texts.as_ptr(), names.as_ptr());
        ok(
            "nvrtcCreateProgram",
            sys::nvrtcCreateProgram(&mut program.0, body.as_ptr(), name.as_ptr(), count, texts, names),
        )?;
        let made = sys::nvrtcCompileProgram(program.0, options.len() as i32, options.as_ptr());
        let mut size = 0;
        ok("nvrtcGetProgramLogSize", sys::nvrtcGetProgramLogSize(program.0, &mut size))?;
        let mut log = vec![0u8; size];
        ok("nvrtcGetProgramLog", sys::nvrtcGetProgramLog(program.0, log.as_mut_ptr().cast()))?;
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_string();
        if made != sys::nvrtcResult::NVRTC_SUCCESS {
            return Err(refuse("the compilation", made, &log));
        }
        ok("nvrtcGetCUBINSize", sys::nvrtcGetCUBINSize(program.0, &mut size))?;
        let mut image = vec![0u8; size];
        ok("nvrtcGetCUBIN", sys::nvrtcGetCUBIN(program.0, image.as_mut_ptr().cast()))?;
        Ok(Compiled { image, log })
    }
}
