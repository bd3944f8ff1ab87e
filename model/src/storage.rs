//! What each matrix of a checkpoint is stored in: as its files' headers say, or, without files, as its config does. All
//! that planning needs to know of weights.

use crate::catalog::{self, Role, Shape, TensorDecl, TensorId};
use crate::keep::Stored;
use crate::quant::{Format, ScaleFormat};
use crate::spec::{Layer, ModelSpec};
use std::collections::BTreeMap;

/// By role, of what lies outside layers and of every layer. The experts of a layer are one.
#[derive(Debug, Clone, PartialEq)]
pub struct Storage {
    outer: Roles,
    layers: Vec<Roles>,
}

type Roles = BTreeMap<Role, Stored>;

impl Storage {
    /// As the config states it: in `plain` numbers what its quantisation leaves.
    pub fn stated(spec: &ModelSpec, plain: Format) -> Storage {
        let one = |layer: Option<usize>, shape: &Shape| {
            let expert = shape.cut.is_expert().then_some(0);
            let id = TensorId { layer, role: shape.role, expert };
            let stored = match spec.scheme(&id, shape.cols) {
                None => Stored::Plain(plain),
                Some(_) if is_scattered(spec, shape.cols) => Stored::Plain(container(spec)),
                Some(scheme) => Stored::Coded(scheme),
            };
            (shape.role, stored)
        };
        let all = |layer, shapes: Vec<Shape>| -> Roles {
            shapes.iter().filter(|shape| !shape.role.is_vector()).map(|shape| one(layer, shape)).collect()
        };
        let layer = |(index, layer): (usize, &Layer)| {
            let mut shapes = catalog::layer_shapes(spec, layer);
            if index >= spec.layers.len() {
                shapes.extend(catalog::predictor_shapes(spec));
            }
            all(Some(index), shapes)
        };
        let layers = spec.all_layers().enumerate().map(layer).collect();
        Storage { outer: all(None, catalog::outer_shapes(spec)), layers }
    }

    /// As headers say: `format` tells that of a tensor by its name. What they do not have, and the loader is going to
    /// miss, counts as plain bf16.
    pub fn found(spec: &ModelSpec, format: &dyn Fn(&str) -> Option<Format>) -> Storage {
        let mut storage = Storage { outer: Roles::new(), layers: vec![Roles::new(); spec.all_layers().count()] };
        for decl in catalog::tensors(spec).iter().filter(|decl| !decl.id.role.is_vector()) {
            let stored = stored(spec, decl, format);
            let roles = match decl.id.layer {
                None => &mut storage.outer,
                Some(layer) => &mut storage.layers[layer],
            };
            // Experts that differ are not counted apart, but none takes more than widened ones.
            let kept = roles.entry(decl.id.role).or_insert(stored);
            if *kept != stored {
                *kept = Stored::Plain(Format::F32);
            }
        }
        storage
    }

    /// Of all tensors of a role in a layer, or outside layers.
    pub fn of(&self, layer: Option<usize>, role: Role) -> Stored {
        let roles = layer.map_or(Some(&self.outer), |layer| self.layers.get(layer));
        roles.and_then(|roles| roles.get(&role)).copied().unwrap_or(Stored::Plain(Format::Bf16))
    }

    /// Whether two layers of one shape take the same bytes.
    pub fn alike(&self, one: usize, other: usize) -> bool {
        self.layers.get(one) == self.layers.get(other)
    }

    /// Whether all is stored in f32.
    pub fn is_f32(&self) -> bool {
        let all = || self.layers.iter().flat_map(Roles::values).chain(self.outer.values());
        all().count() > 0 && all().all(|stored| *stored == Stored::Plain(Format::F32))
    }
}

fn stored(spec: &ModelSpec, decl: &TensorDecl, format: &dyn Fn(&str) -> Option<Format>) -> Stored {
    let (name, cols) = (&decl.source.name, decl.cols);
    if let Some(quantisation) = &spec.quantisation {
        let method = &quantisation.method;
        let codes = method.codes_name(name);
        if format(&codes).is_some_and(|found| codes != *name || !found.is_plain()) {
            let names = method.scales_names(name);
            let scale = names.iter().find_map(|name| format(name)).and_then(ScaleFormat::stored_as);
            return match is_scattered(spec, cols) {
                true => Stored::Plain(container(spec)),
                false => Stored::Coded(method.scheme(cols, scale.unwrap_or(method.usual_scale()))),
            };
        }
    }
    let format = format(name).unwrap_or(Format::Bf16);
    match format.scheme() {
        Some(scheme) if !decl.source.part.transposed => Stored::Coded(scheme),
        _ => Stored::Plain(format),
    }
}

/// Whether the groups of a matrix of `inputs` inputs are no runs of neighbours.
fn is_scattered(spec: &ModelSpec, inputs: usize) -> bool {
    let groups = |q: &crate::quantisation::Quantisation| q.method.group().is_some_and(|group| group < inputs);
    spec.quantisation.as_ref().is_some_and(|q| q.scattered && groups(q))
}

fn container(spec: &ModelSpec) -> Format {
    spec.quantisation.as_ref().map_or(Format::I32, |q| q.method.container())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{Code, Scales};
    use crate::samples;

    fn code(stored: Stored) -> Option<(Code, Scales)> {
        match stored {
            Stored::Plain(_) => None,
            Stored::Coded(scheme) => Some((scheme.code, scheme.scales)),
        }
    }

    #[test]
    fn a_config_states_what_its_quantisation_takes_on() {
        let mut spec = samples::spec("deepseek");
        spec.quantisation = None;
        let plain = Storage::stated(&spec, Format::F16);
        assert_eq!(plain.of(Some(5), Role::ExpertUp), Stored::Plain(Format::F16));
        assert!(plain.alike(3, 60) && !plain.alike(2, 3), "dense layers have no experts");
        assert!(!plain.is_f32() && Storage::stated(&spec, Format::F32).is_f32());
    }

    #[test]
    fn headers_say_what_each_tensor_is_stored_in() {
        use crate::quantisation::{Extent, Method, Quantisation};
        let mut spec = samples::spec("deepseek");
        let extent = Extent { rows: Some(128), cols: Some(128) };
        spec.quantisation = Some(Quantisation { method: Method::Fp8(extent), kept: Vec::new(), scattered: false });
        let odd = "model.layers.4.mlp.experts.7.up_proj.weight";
        let format = |name: &str| match name {
            _ if name.ends_with("_scale_inv") => Some(Format::Bf16),
            _ if name == odd || name.contains("norm") || name.ends_with("head.weight") => Some(Format::Bf16),
            _ => Some(Format::F8E4m3),
        };
        let found = Storage::found(&spec, &format);
        let fp8 = Some((Code::E4m3, Scales::Single(ScaleFormat::Bf16)));
        assert_eq!(code(found.of(Some(3), Role::ExpertUp)), fp8);
        assert_eq!(code(found.of(Some(0), Role::Output)), fp8);
        assert_eq!(found.of(Some(4), Role::ExpertUp), Stored::Plain(Format::F32), "one expert differs");
        assert_eq!(found.of(None, Role::Head), Stored::Plain(Format::Bf16));
        assert!(found.alike(3, 5) && !found.alike(3, 4));
    }
}
