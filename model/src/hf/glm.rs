//! GLM-4.5 to 4.7: half of each head rotated, queries, keys and values biased, DeepSeek-V3's mixtures.

use super::{Body, Common, Keys, deepseek, heads, rope};
use crate::error::SpecError;
use crate::rope::Layout;
use crate::spec::{Grouped, Mixer, QkNorm};

pub(super) fn body(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    let h = heads(keys, common, None)?;
    let mixer = Mixer::Grouped(Grouped {
        qkv_bias: keys.flag("attention_bias", false)?,
        qk_norm: keys.flag("use_qk_norm", false)?.then_some(QkNorm::Heads(common.norm)),
        rope: Some(rope::read_part(keys, common, h.head_dim, 0.5, 1e4, Layout::Half)?),
        ..h.plain()
    });
    let defaults = deepseek::Defaults { first_dense: 1, groups: (1, 1), active: 8, scale: 1.0 };
    deepseek::mixtures(keys, common, &mixer, &defaults)
}
