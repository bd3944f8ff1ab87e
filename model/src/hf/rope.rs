//! The rope dialects of configs: `rope_theta` beside `rope_scaling`, or both inside `rope_parameters`.

use super::{Common, Keys};
use crate::bounds::POSITIONS_MAX;
use crate::error::SpecError;
use crate::rope::{Layout, Rope, Scaling};
use crate::spec::QueryScale;

/// Reads the rotation of heads of `head_dim` channels.
pub(super) fn read(
    keys: &Keys<'_>,
    common: &Common,
    head_dim: usize,
    theta_default: f64,
    layout: Layout,
) -> Result<Rope, SpecError> {
    read_part(keys, common, head_dim, 1.0, theta_default, layout)
}

/// The same where only `part_default` of a head is rotated unless the config says otherwise.
pub(super) fn read_part(
    keys: &Keys<'_>,
    common: &Common,
    head_dim: usize,
    part_default: f64,
    theta_default: f64,
    layout: Layout,
) -> Result<Rope, SpecError> {
    let outer_theta = keys.optional_float("rope_theta")?;
    let outer_partial = keys.optional_float("partial_rotary_factor")?;
    let outer_original = keys.optional_size("original_max_position_embeddings", POSITIONS_MAX)?;
    let (mut theta, mut partial, mut scaling) = (outer_theta, outer_partial, Scaling::None);
    if let Some(section) = section(keys)? {
        theta = section.optional_float("rope_theta")?.or(theta);
        partial = section.optional_float("partial_rotary_factor")?.or(partial);
        scaling = self::scaling(&section, common, outer_original)?;
        // Read by [`query_scale`], and a repetition of the outer key.
        section.value("llama_4_scaling_beta");
        section.value("max_position_embeddings");
        keys.absorb(section);
    }
    let partial = partial.unwrap_or(part_default);
    if !(partial > 0.0 && partial <= 1.0) {
        return Err(SpecError::bad("partial_rotary_factor", partial, "must be above 0 and at most 1"));
    }
    let dims = (head_dim as f64 * partial) as usize;
    Ok(Rope { dims, theta: theta.unwrap_or(theta_default), layout, scaling })
}

/// DeepSeek's second use of yarn's `mscale_all_dim`: what the softmax scale is multiplied with, twice.
pub(super) fn attention_stretch(keys: &Keys<'_>, common: &Common) -> Result<f64, SpecError> {
    let Some(section) = section(keys)? else { return Ok(1.0) };
    if kind(&section)? == "default" {
        return Ok(1.0);
    }
    let all = section.optional_float("mscale_all_dim")?.unwrap_or(0.0);
    if all == 0.0 {
        return Ok(1.0);
    }
    let original = section.optional_size("original_max_position_embeddings", POSITIONS_MAX)?;
    let factor = factor(&section, common, original.unwrap_or(common.positions_max))?;
    Ok(mscale(factor, all))
}

/// Ministral 3's and Mistral 4's growth of queries with position, past the context of the first training.
pub(super) fn query_scale(keys: &Keys<'_>) -> Result<Option<QueryScale>, SpecError> {
    let Some(section) = section(keys)? else { return Ok(None) };
    let Some(beta) = section.optional_float("llama_4_scaling_beta")? else { return Ok(None) };
    let period = section.size("original_max_position_embeddings", POSITIONS_MAX)?;
    Ok(Some(QueryScale { beta: beta as f32, period, offset: 0 }))
}

/// The object that describes the rotation, by its older or newer name.
fn section<'a>(keys: &Keys<'a>) -> Result<Option<Keys<'a>>, SpecError> {
    let (older, newer) = (keys.value("rope_scaling"), keys.value("rope_parameters"));
    if let (Some(older), Some(newer)) = (older, newer)
        && older != newer
    {
        return Err(keys.bad("rope_scaling", older, "rope_parameters is given too, and differs"));
    }
    Ok(keys.section("rope_scaling")?.or(keys.section("rope_parameters")?))
}

/// `rope_type`, or `type` as it was once called.
fn kind<'a>(section: &Keys<'a>) -> Result<&'a str, SpecError> {
    let older = section.text("type")?;
    Ok(section.text("rope_type")?.or(older).unwrap_or("default"))
}

fn scaling(section: &Keys<'_>, common: &Common, outer: Option<usize>) -> Result<Scaling, SpecError> {
    let original = || -> Result<usize, SpecError> {
        let own = section.optional_size("original_max_position_embeddings", POSITIONS_MAX)?;
        Ok(outer.or(own).unwrap_or(common.positions_max))
    };
    Ok(match kind(section)? {
        "default" => Scaling::None,
        // Three position axes, which are one for text.
        "mrope" => {
            section.list("mrope_section")?;
            Scaling::None
        }
        "linear" => Scaling::Linear { factor: section.float("factor")? },
        "dynamic" => Scaling::Dynamic { factor: section.float("factor")?, original: common.positions_max },
        "llama3" => Scaling::Llama3 {
            factor: section.float("factor")?,
            low: section.float("low_freq_factor")?,
            high: section.float("high_freq_factor")?,
            original: original()?,
        },
        "yarn" => yarn(section, common, original()?)?,
        _ => {
            let key = if section.has("rope_type") { "rope_type" } else { "type" };
            let value = section.value(key).expect("a kind that is not the default was read from a key");
            return Err(section.bad(key, value, "known: default, mrope, linear, dynamic, llama3, yarn"));
        }
    })
}

fn yarn(section: &Keys<'_>, common: &Common, original: usize) -> Result<Scaling, SpecError> {
    let factor = factor(section, common, original)?;
    // Zero counts as absent in the reference, for these four.
    let optional = |key| Ok::<_, SpecError>(section.optional_float(key)?.filter(|f| *f != 0.0));
    let (one, all) = (optional("mscale")?, optional("mscale_all_dim")?);
    let stated = section.optional_float("attention_factor")?;
    let amplitude = match (stated, one, all) {
        (Some(stated), ..) => stated,
        (None, Some(one), Some(all)) => mscale(factor, one) / mscale(factor, all),
        _ => mscale(factor, 1.0),
    };
    Ok(Scaling::Yarn {
        factor,
        original,
        beta_fast: optional("beta_fast")?.unwrap_or(32.0),
        beta_slow: optional("beta_slow")?.unwrap_or(1.0),
        truncate: section.flag("truncate", true)?,
        amplitude,
    })
}

/// Yarn's factor; where a config leaves it out, the ratio of the two lengths.
fn factor(section: &Keys<'_>, common: &Common, original: usize) -> Result<f64, SpecError> {
    Ok(section.optional_float("factor")?.unwrap_or(common.positions_max as f64 / original as f64))
}

fn mscale(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * libm::log(factor) + 1.0 }
}
