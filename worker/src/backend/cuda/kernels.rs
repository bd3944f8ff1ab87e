//! The kernels of `worker/kernels` by name, and the structs that they take: field for field those of the `.cu` files.

use super::compile::compile;
use super::driver::{Address, Driver, Kernel};
use super::images::{Image, fitting};
use super::texts::{SOURCES, Text};
use model::fault::{Fault, FaultKind};

/// For f32 and for bf16 inputs.
pub type Pair = [Kernel; 2];

/// Every kernel, loaded.
pub struct Kernels {
    pub norm: Pair,
    pub add: Kernel,
    pub sum_parts: Kernel,
    pub activate: Pair,
    pub copy: Pair,
    pub round: Pair,
    pub matmul: Pair,
    pub embed: Kernel,
    pub head_squares: Kernel,
    pub prepare: Pair,
    pub latent: Pair,
    pub attend: Pair,
    pub route: Kernel,
    pub combine: Kernel,
    /// On tensor cores, bf16: of plain weights and of codes, for few rows and for many.
    pub tensor: [[Kernel; 2]; 2],
}

impl Kernels {
    /// Loads them for this device: `images` where it runs some, otherwise what NVRTC makes of the texts.
    pub fn load(driver: &Driver, images: &[Image<'_>]) -> Result<Kernels, Fault> {
        let why = match fitting(images, driver.capability) {
            Ok(images) => match Kernels::of(driver, |source| find(&images, source)) {
                Ok(kernels) => return Ok(kernels),
                Err(fault) => format!("those built in can't be loaded: {}", fault.text),
            },
            Err(why) => why,
        };
        tracing::info!("compiling kernels for {}: {why}", driver.name);
        Kernels::of(driver, |source| Ok(compile(source, driver.capability)?.image))
            .map_err(|fault| Fault::new(fault.kind, format!("{}; {why}", fault.text)))
    }

    fn of(driver: &Driver, image: impl Fn(&Text) -> Result<Vec<u8>, Fault>) -> Result<Kernels, Fault> {
        let [rows, products, attention, experts, tensor] = &SOURCES;
        let load = |source, names: &[&str]| driver.load(&image(source)?, names);
        let rows = load(
            rows,
            &[
                "norm_f32",
                "norm_bf16",
                "add",
                "activate_f32",
                "activate_bf16",
                "copy_f32",
                "copy_bf16",
                "round_bf16",
                "sum_parts",
            ],
        )?;
        let products = load(products, &["matmul_f32", "matmul_bf16", "embed"])?;
        let attention = load(
            attention,
            &["head_squares", "prepare_f32", "prepare_bf16", "latent_f32", "latent_bf16", "attend_f32", "attend_bf16"],
        )?;
        let experts = load(experts, &["route", "combine"])?;
        let tensor = load(tensor, &["tensor_few", "tensor_many", "tensor_codes_few", "tensor_codes_many"])?;
        Ok(Kernels {
            norm: [rows[0], rows[1]],
            add: rows[2],
            activate: [rows[3], rows[4]],
            copy: [rows[5], rows[6]],
            round: [rows[5], rows[7]],
            sum_parts: rows[8],
            matmul: [products[0], products[1]],
            embed: products[2],
            head_squares: attention[0],
            prepare: [attention[1], attention[2]],
            latent: [attention[3], attention[4]],
            attend: [attention[5], attention[6]],
            route: experts[0],
            combine: experts[1],
            tensor: [[tensor[0], tensor[1]], [tensor[2], tensor[3]]],
        })
    }
}

/// A copy of a source's image: what was built in may begin anywhere, and a driver reads an image as numbers of eight bytes.
fn find(images: &[Image<'_>], source: &Text) -> Result<Vec<u8>, Fault> {
    let image = images.iter().find(|image| image.source == source.name);
    let image = image.ok_or_else(|| Fault::new(FaultKind::Internal, format!("{} is not among them", source.name)))?;
    Ok(image.bytes.to_vec())
}

/// Threads of a block of most kernels, and warps.
pub const THREADS: usize = 128;
pub const WARPS: usize = THREADS / 32;
/// Outputs of a panel of weights, and threads of its block.
pub const PANEL: usize = 64;
/// Rows that a block multiplies.
pub const ROWS: usize = 8;
/// The same on tensor cores, for few rows and for many, and threads of a block.
pub const TENSOR_ROWS: [usize; 2] = [16, 32];
pub const TENSOR_THREADS: usize = 256;
/// Inputs that they take at once.
pub const TENSOR_STEP: usize = 16;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct NormArgs {
    pub x: Address,
    pub weight: Address,
    pub bias: Address,
    pub out: Address,
    pub n: u32,
    pub width: u32,
    pub eps: f32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct AddArgs {
    pub x: Address,
    pub y: Address,
    pub bias: Address,
    pub row_biases: Address,
    pub values: u64,
    pub cols: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct ActivateArgs {
    pub x: Address,
    pub out: Address,
    pub values: u64,
    pub cols: u32,
    pub gated: u32,
    pub kind: u32,
    pub alpha: f32,
    pub limit: f32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct CopyArgs {
    pub x: Address,
    pub out: Address,
    pub rows: Address,
    pub weights: Address,
    pub values: u64,
    pub cols: u32,
    pub x_stride: u32,
    pub out_stride: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct SumPartsArgs {
    pub parts: Address,
    pub out: Address,
    pub values: u64,
    pub count: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Plane {
    pub bytes: Address,
    pub count: u32,
    pub each: u32,
}

impl Plane {
    pub const NONE: Plane = Plane { bytes: 0, count: 0, each: 0 };
}

/// What a weight is kept as.
#[derive(Clone, Copy, PartialEq)]
#[repr(u32)]
pub enum Form {
    Halves,
    Floats,
    Nibbles,
    Integers,
    Fp8,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Weight {
    pub words: Address,
    pub rows: u32,
    pub cols: u32,
    pub segments: u32,
    pub pairs: u32,
    pub form: Form,
    pub run: u32,
    pub span: u32,
    pub scale_form: u32,
    pub unit: f32,
    pub point: f32,
    pub entries: [f32; 16],
    /// Codes, scales, integers, minima, minimum integers, points.
    pub planes: [Plane; 6],
}

// The `.cu` files assert the same of theirs.
const _: () = assert!(size_of::<Weight>() == 208 && size_of::<Tile>() == 12 && size_of::<Row>() == 16);

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Tile {
    pub weight: u32,
    pub first: u32,
    pub count: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct MatmulArgs {
    pub x: Address,
    pub out: Address,
    pub bias: Address,
    pub one: Address,
    pub many: Address,
    pub tiles: Address,
    pub picks: Address,
    pub n: u32,
    pub x_stride: u32,
    pub x_step: u32,
    pub out_stride: u32,
    pub out_step: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct EmbedArgs {
    pub table: Address,
    pub ids: Address,
    pub out: Address,
    pub n: u32,
    pub first: u32,
}

/// Where one row stands.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Row {
    pub position: u32,
    pub sequence: u32,
    pub block: u32,
    pub slot: u32,
}

/// Where things lie in a cache, in elements.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct Layout {
    pub block: u64,
    pub head: u32,
    pub key_d: u32,
    pub key_t: u32,
    pub value: u32,
    pub value_t: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct SquaresArgs {
    pub qkv: Address,
    pub out: Address,
    pub n: u32,
    pub cols: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub dim: u32,
    pub first: u32,
    pub keys: u32,
    pub counts: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct PrepareArgs {
    pub qkv: Address,
    pub cache: Address,
    pub rows: Address,
    pub query_weight: Address,
    pub key_weight: Address,
    pub squares: Address,
    pub cos: Address,
    pub sin: Address,
    pub query_scale: Address,
    pub layout: Layout,
    pub n: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub dim: u32,
    pub norm: u32,
    pub turn: u32,
    pub pairs: u32,
    pub square_cols: u32,
    pub all_heads: u32,
    pub eps: f32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct LatentArgs {
    pub q: Address,
    pub kv: Address,
    pub cache: Address,
    pub rows: Address,
    pub weight: Address,
    pub cos: Address,
    pub sin: Address,
    pub query_scale: Address,
    pub layout: Layout,
    pub n: u32,
    pub heads: u32,
    pub rank: u32,
    pub nope: u32,
    pub pairs: u32,
    pub turn: u32,
    pub eps: f32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct AttendArgs {
    pub q: Address,
    pub q_rest: Address,
    pub cache: Address,
    pub out: Address,
    pub rows: Address,
    pub tables: Address,
    pub starts: Address,
    pub slopes: Address,
    pub sinks: Address,
    pub layout: Layout,
    pub n: u32,
    pub heads: u32,
    pub group: u32,
    pub first: u32,
    pub q_row: u32,
    pub q_head: u32,
    pub rest: u32,
    pub rest_row: u32,
    pub rest_head: u32,
    pub value_dim: u32,
    pub sees: u32,
    pub size: u32,
    pub scale: f32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct RouteArgs {
    pub logits: Address,
    pub correction: Address,
    pub ids: Address,
    pub weights: Address,
    pub n: u32,
    pub experts: u32,
    pub active: u32,
    pub softmax: u32,
    pub groups: u32,
    pub kept: u32,
    pub renormalise: u32,
    pub eps: f32,
    pub scale: f32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct CombineArgs {
    pub pairs: Address,
    pub out: Address,
    pub starts: Address,
    pub of_row: Address,
    pub ends: Address,
    pub weights: Address,
    pub cols: u32,
    pub segments: u32,
}
