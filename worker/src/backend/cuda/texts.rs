//! The texts of the kernels, and what they are compiled with. `build.rs` reads this file too: it names nothing of the worker.

/// A file of text, by its name.
pub struct Text {
    pub name: &'static str,
    pub text: &'static str,
}

const fn text(name: &'static str, text: &'static str) -> Text {
    Text { name, text }
}

/// Each becomes one image.
pub const SOURCES: [Text; 5] = [
    text("rows.cu", include_str!("../../../kernels/rows.cu")),
    text("matmul.cu", include_str!("../../../kernels/matmul.cu")),
    text("attention.cu", include_str!("../../../kernels/attention.cu")),
    text("experts.cu", include_str!("../../../kernels/experts.cu")),
    text("tensor.cu", include_str!("../../../kernels/tensor.cu")),
];

/// What sources include.
pub const HEADERS: [Text; 4] = [
    text("dev.cuh", include_str!("../../../kernels/dev.cuh")),
    text("order.cuh", include_str!("../../../kernels/order.cuh")),
    text("weights.cuh", include_str!("../../../kernels/weights.cuh")),
    text("products.cuh", include_str!("../../../kernels/products.cuh")),
];

/// What keeps every architecture's arithmetic alike: nothing is fused that the kernels do not fuse, subnormal numbers are zero,
/// quotients and roots are rounded once. The last one changes no code: the log says what each kernel takes of a GPU.
pub const OPTIONS: [&str; 6] =
    ["--std=c++17", "--fmad=false", "--ftz=true", "--prec-div=true", "--prec-sqrt=true", "--ptxas-options=-v"];

/// Compute capabilities that kernels are held to; 90 is a Hopper.
pub const CAPABILITIES: [u32; 5] = [80, 89, 90, 100, 120];

/// `sm_90a`. Some capabilities have code of their own beside the common one, which runs on no other.
pub fn architecture(capability: u32) -> String {
    let own = if matches!(capability, 90 | 100 | 103 | 120) { "a" } else { "" };
    format!("sm_{capability}{own}")
}

/// `matmul-sm_90a-0123456789abcdef.cubin`, the name of an image's file: it tells everything that the image was made of, so that none
/// made of other texts is taken for it.
pub fn file(source: &Text, capability: u32) -> String {
    let architecture = architecture(capability);
    let headers = HEADERS.iter().flat_map(|header| [header.name, header.text]);
    let parts = [source.name, source.text, &architecture].into_iter().chain(headers).chain(OPTIONS);
    // FNV-1a, with an end to each part: against mistakes, not against malice.
    let bytes = parts.flat_map(|part| part.bytes().chain([0xff]));
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{}-{architecture}-{hash:016x}.cubin", source.name.trim_end_matches(".cu"))
}
