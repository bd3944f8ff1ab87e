//! The dense branch: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate, its channels cut over the tensor ranks.

use super::pass::Pass;
use super::weights::LayerLoader;
use crate::backend::{Backend, Kind};
use model::catalog::Role;
use model::fault::Fault;
use model::spec::{Activation, Dense};

/// One branch's weights on this rank.
pub struct Mlp<B: Backend> {
    /// `[gate | up]` rows, or those of up alone.
    up: B::Matrix,
    up_bias: Option<B::Vector>,
    down: B::Matrix,
    down_bias: Option<B::Vector>,
    activation: Activation,
    gated: bool,
    /// Channels of this rank.
    channels: usize,
    hidden: usize,
}

impl<B: Backend> Mlp<B> {
    pub fn load(spec: &Dense, from: &LayerLoader<'_, B>) -> Result<Mlp<B>, Fault> {
        Mlp::of(spec, from, [Role::Gate, Role::Up, Role::Down])
    }

    /// The expert that every token of a mixture visits.
    pub fn load_shared(spec: &Dense, from: &LayerLoader<'_, B>) -> Result<Mlp<B>, Fault> {
        assert!(spec.gated && !spec.bias, "the catalogue declares a shared expert's gate, and no biases");
        Mlp::of(spec, from, [Role::SharedGate, Role::SharedUp, Role::SharedDown])
    }

    fn of(spec: &Dense, from: &LayerLoader<'_, B>, [gate, up, down]: [Role; 3]) -> Result<Mlp<B>, Fault> {
        let bias = |roles: &[Role]| if spec.bias { from.vector(roles).map(Some) } else { Ok(None) };
        let (ups, biases): (&[Role], &[Role]) = match spec.gated {
            true => (&[gate, up], &[Role::GateBias, Role::UpBias]),
            false => (&[up], &[Role::UpBias]),
        };
        Ok(Mlp {
            up: from.matrix(ups)?,
            up_bias: bias(biases)?,
            down: from.matrix(&[down])?,
            down_bias: bias(&[Role::DownBias])?,
            activation: spec.activation,
            gated: spec.gated,
            channels: spec.intermediate / from.mesh.tensor,
            hidden: from.hidden,
        })
    }

    /// `x += mlp(normed)`.
    pub fn run(&self, pass: &mut Pass<'_, B>, normed: &B::Buffer, x: &mut B::Buffer) -> Result<(), Fault> {
        let rows = pass.rows;
        let width = if self.gated { 2 * self.channels } else { self.channels };
        let mut up = pass.take(width, Kind::Full)?;
        let mut active = pass.take(self.channels, Kind::Input)?;
        let weights = (&self.up, self.up_bias.as_ref());
        pass.backend.matmul_activate(normed, weights, self.activation, rows, &mut up, &mut active)?;
        pass.give(width, Kind::Full, up);
        let y = pass.matmul_sum(&active, &self.down, self.hidden)?;
        pass.give(self.channels, Kind::Input, active);
        pass.backend.add(x, &y, self.down_bias.as_ref(), rows)?;
        pass.give(self.hidden, Kind::Full, y);
        Ok(())
    }
}
