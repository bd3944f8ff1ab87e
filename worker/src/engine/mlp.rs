//! The dense branch: `down(act(gate(x)) * up(x))`, its channels cut over the tensor ranks.

use super::pass::Pass;
use super::weights::LayerLoader;
use crate::backend::{Backend, Kind};
use model::catalog::Role;
use model::fault::Fault;
use model::spec::{Activation, Dense};

/// One branch's weights on this rank.
pub struct Mlp<B: Backend> {
    /// `[gate | up]` rows.
    gate_up: B::Matrix,
    gate_up_bias: Option<B::Vector>,
    down: B::Matrix,
    down_bias: Option<B::Vector>,
    activation: Activation,
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
        assert!(!spec.bias, "no published shared expert has biases, and the catalogue declares none");
        Mlp::of(spec, from, [Role::SharedGate, Role::SharedUp, Role::SharedDown])
    }

    fn of(spec: &Dense, from: &LayerLoader<'_, B>, [gate, up, down]: [Role; 3]) -> Result<Mlp<B>, Fault> {
        let bias = |roles: &[Role]| if spec.bias { from.vector(roles).map(Some) } else { Ok(None) };
        Ok(Mlp {
            gate_up: from.matrix(&[gate, up])?,
            gate_up_bias: bias(&[Role::GateBias, Role::UpBias])?,
            down: from.matrix(&[down])?,
            down_bias: bias(&[Role::DownBias])?,
            activation: spec.activation,
            channels: spec.intermediate / from.mesh.tensor,
            hidden: from.hidden,
        })
    }

    /// `x += mlp(normed)`.
    pub fn run(&self, pass: &mut Pass<'_, B>, normed: &B::Buffer, x: &mut B::Buffer) -> Result<(), Fault> {
        let rows = pass.rows;
        let mut gate_up = pass.take(2 * self.channels, Kind::Full)?;
        pass.backend.matmul(normed, &self.gate_up, self.gate_up_bias.as_ref(), rows, &mut gate_up)?;
        let mut active = pass.take(self.channels, Kind::Input)?;
        pass.backend.activate(&gate_up, self.activation, rows, &mut active)?;
        pass.give(2 * self.channels, Kind::Full, gate_up);
        let y = pass.matmul_sum(&active, &self.down, self.hidden)?;
        pass.give(self.channels, Kind::Input, active);
        pass.backend.add(x, &y, self.down_bias.as_ref(), rows)?;
        pass.give(self.hidden, Kind::Full, y);
        Ok(())
    }
}
