//! The way to the coordinator that leads: every address of every name that the settings give is tried in turn.

use super::error::AgentError;
use crate::config::Config;
use std::net::SocketAddr;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};

/// Between two rounds through all addresses.
const RECONNECT: Duration = Duration::from_millis(300);

/// Between two pings, and how long their answers may take: a coordinator that is silent for longer stands still.
const PING: Duration = Duration::from_millis(500);
pub const SILENCE: Duration = Duration::from_secs(2);

pub struct Door<'a> {
    config: &'a Config,
    /// What is left of this round, and how many there were.
    left: Vec<SocketAddr>,
    round: usize,
    /// Tried last of the next round: if it was left for its silence, another one leads now.
    last: Option<SocketAddr>,
    /// What was last said of why there is no coordinator; nothing new is worth a line.
    said: String,
}

impl<'a> Door<'a> {
    pub fn new(config: &'a Config) -> Door<'a> {
        Door { config, left: Vec::new(), round: 1, last: None, said: String::new() }
    }

    /// A connection to the next address, if it answers.
    pub async fn next(&mut self) -> Result<Option<Channel>, AgentError> {
        if self.left.is_empty() {
            self.left = self.resolve().await;
            self.round = self.left.len().max(1);
        }
        let Some(address) = self.left.pop() else { return Ok(None) };
        self.last = Some(address);
        match self.endpoint(address)?.connect().await {
            Ok(channel) => Ok(Some(channel)),
            Err(error) => {
                self.closed(&format!("{address}: {}", causes(&error)));
                Ok(None)
            }
        }
    }

    /// The last connection was of no use.
    pub fn closed(&mut self, why: &str) {
        if self.said != why && self.left.is_empty() {
            tracing::info!("waiting for the coordinator at {}: {why}", self.config.coordinator);
            self.said = why.into();
        }
    }

    /// The last connection was of use: whoever leads next may be any.
    pub fn opened(&mut self) {
        self.left.clear();
        self.said.clear();
    }

    /// Before the next address: a round takes as long as one address alone.
    pub fn pause(&self) -> Duration {
        RECONNECT / self.round as u32
    }

    /// All addresses, in the order of being popped.
    async fn resolve(&mut self) -> Vec<SocketAddr> {
        let mut all = Vec::new();
        for name in self.config.coordinator.split(',').map(str::trim) {
            match tokio::net::lookup_host(name).await {
                Ok(found) => all.extend(found),
                Err(error) => self.closed(&format!("{name}: {error}")),
            }
        }
        all.reverse();
        all.sort_by_key(|address| self.last != Some(*address));
        all
    }

    fn endpoint(&self, address: SocketAddr) -> Result<Endpoint, AgentError> {
        let tls = self.config.tls.as_ref();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let unusable = |why: String| AgentError::Address { address: address.to_string(), why };
        let endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
            .map_err(|e| unusable(e.to_string()))?
            .tcp_nodelay(true)
            .connect_timeout(Duration::from_secs(5))
            .keep_alive_while_idle(true)
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(SILENCE);
        // Read anew for each connection: certificates are renewed in place.
        match tls {
            None => Ok(endpoint),
            Some(tls) => endpoint.tls_config(tls.client()?).map_err(|e| unusable(format!("[tls]: {e}"))),
        }
    }
}

/// An error and what it comes from.
fn causes(error: &dyn std::error::Error) -> String {
    let more = std::iter::successors(error.source(), |error| error.source());
    more.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_address_is_tried_once_a_round_in_order() {
        let config: Config = toml::from_str("coordinator = '127.0.0.1:1, 127.0.0.1:2,localhost:3'").unwrap();
        let mut door = Door::new(&config);
        let mut ports: Vec<u16> = door.resolve().await.iter().rev().map(|a| a.port()).collect();
        ports.dedup();
        assert_eq!(ports, [1, 2, 3]);
        // Nobody listens there.
        assert!(door.next().await.unwrap().is_none());
        assert!(door.pause() <= RECONNECT / 3);
        door.opened();
        let again: Vec<u16> = door.resolve().await.iter().rev().map(|a| a.port()).collect();
        assert_eq!((again[0], again.last()), (2, Some(&1)), "the one that was left is tried last");
    }
}
