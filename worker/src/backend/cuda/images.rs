//! Images of the kernels that were built into the program (`worker/build.rs`): with them, a host needs no NVRTC.

use super::texts::architecture;

/// A source's code, by the name of the source, for GPUs of one compute capability and those that run the same.
#[derive(Clone, Copy)]
pub struct Image<'a> {
    pub source: &'a str,
    pub capability: u32,
    pub bytes: &'a [u8],
}

/// All of them, for every one of [`CAPABILITIES`]; or none, in a program that was built without.
///
/// [`CAPABILITIES`]: super::texts::CAPABILITIES
pub static BUILT_IN: &[Image<'static>] = &include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Whether a GPU of capability `gpu` runs code for `code`: its own, and the common code of earlier GPUs of its generation (86 that of
/// 80). Code of an architecture's own runs on no other, and what is embedded (87) shares none.
fn runs(gpu: u32, code: u32) -> bool {
    let common = !architecture(code).ends_with('a') && gpu != 87;
    gpu == code || (common && gpu / 10 == code / 10 && gpu > code)
}

/// Those of `images` that a GPU of capability `gpu` runs best; or why there are none.
pub fn fitting<'a>(images: &[Image<'a>], gpu: u32) -> Result<Vec<Image<'a>>, String> {
    let Some(best) = images.iter().map(|image| image.capability).filter(|&code| runs(gpu, code)).max() else {
        return Err(match images.is_empty() {
            true => "none are built into this program".to_string(),
            false => format!("those built in are for {}, none of which sm_{gpu} runs", architectures(images)),
        });
    };
    Ok(images.iter().filter(|image| image.capability == best).copied().collect())
}

/// `sm_80, sm_90a`: what they are for.
pub fn architectures(images: &[Image<'_>]) -> String {
    let mut all: Vec<u32> = images.iter().map(|image| image.capability).collect();
    all.dedup();
    all.into_iter().map(architecture).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::super::texts::CAPABILITIES;
    use super::*;

    #[test]
    fn a_gpu_runs_the_latest_code_of_its_own_generation() {
        let images = CAPABILITIES.map(|capability| Image { source: "rows.cu", capability, bytes: &[] });
        let best =
            |gpu| fitting(&images, gpu).ok().map(|fit| fit.iter().map(|image| image.capability).collect::<Vec<_>>());
        for (gpu, code) in [(80, 80), (86, 80), (89, 89), (90, 90), (100, 100), (120, 120)] {
            assert_eq!(best(gpu), Some(vec![code]), "{gpu}");
        }
        for gpu in [75, 87, 103, 110, 121] {
            assert_eq!(best(gpu), None, "{gpu}");
        }
        let text = "those built in are for sm_80, sm_89, sm_90a, sm_100a, sm_120a, none of which sm_103 runs";
        assert_eq!(fitting(&images, 103).err().as_deref(), Some(text));
        assert_eq!(fitting(&[], 90).err().as_deref(), Some("none are built into this program"));
    }
}
