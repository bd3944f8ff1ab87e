//! What a coordinator does as its role changes: where requests and operators' wishes go, and whose view is shown.

use super::campaign::Standing;
use super::peer::{Introduction, Peer};
use super::relay::Route;
use crate::api::view::{ClusterView, Phase};
use crate::cluster::driver::Ask;
use crate::cluster::role::Role;
use proto::tls::Tls;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// Between two tries to see what the leader sees.
const RETRY: Duration = Duration::from_millis(100);

/// A coordinator among others.
pub struct Follower {
    pub introduction: Introduction,
    pub tls: Option<Tls>,
    /// Where others reach its node plane.
    pub address: String,
    pub role: watch::Receiver<Role>,
    pub standing: watch::Receiver<Standing>,
    pub routes: watch::Sender<Route>,
    pub view: watch::Sender<ClusterView>,
}

impl Follower {
    /// Runs until the engine ends.
    pub async fn run(mut self) {
        let mut before: Option<Peer> = None;
        loop {
            let role = self.role.borrow_and_update().clone();
            let route = match &role {
                Role::Unknown(why) => {
                    self.lost(why);
                    Route::Nowhere
                }
                Role::Leads(lead) => {
                    if let Some(peer) = before.take() {
                        tokio::spawn(announce(peer, self.address.clone(), self.standing.clone()));
                    }
                    Route::Here(lead.clone())
                }
                Role::Follows { address } => match Peer::new(address, &self.introduction, self.tls.as_ref()) {
                    Ok(peer) => Route::There(Box::new(before.insert(peer).clone())),
                    Err(error) => {
                        self.lost(&error.to_string());
                        Route::Nowhere
                    }
                },
            };
            self.routes.send_replace(route.clone());
            let mut role_next = self.role.clone();
            let changed = tokio::select! {
                changed = role_next.changed() => changed,
                () = self.look(&role, &route) => return,
            };
            if changed.is_err() {
                return;
            }
        }
    }

    /// Shows what the leader sees, for ever.
    async fn look(&self, role: &Role, route: &Route) {
        let (Role::Follows { address }, Route::There(peer)) = (role, route) else {
            return std::future::pending().await;
        };
        loop {
            let why = peer.mirror(&self.view).await;
            self.lost(&format!("the coordinator at {address} leads and is out of reach: {why}"));
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Nobody can be asked now; what was accepted waits.
    fn lost(&self, why: &str) {
        self.view.send_if_modified(|view| {
            let phase = if view.phase == Phase::Serving { Phase::Recovering } else { view.phase };
            let reasons = vec![why.to_string()];
            let changed = view.phase != phase || view.reasons != reasons;
            (view.phase, view.reasons) = (phase, reasons);
            changed
        });
    }
}

/// Tells the one that led before, which may not reach the store, that another leads.
async fn announce(peer: Peer, address: String, standing: watch::Receiver<Standing>) {
    let term = match &*standing.borrow() {
        Standing::Leads(Some(term)) => *term,
        _ => return,
    };
    // Dead, most often.
    let _ = peer.lead(address, term).await;
}

/// Passes operators' wishes to whoever leads.
pub async fn pass_asks(mut asks: mpsc::Receiver<Ask>, routes: watch::Receiver<Route>) {
    while let Some(Ask::Drain { worker, answer }) = asks.recv().await {
        let route = routes.borrow().clone();
        let nobody = || "no coordinator leads at the moment: ask again".to_string();
        match route {
            Route::Nowhere => drop(answer.send(Err(nobody()))),
            Route::Here(lead) => drop(lead.asks.send(Ask::Drain { worker, answer }).await),
            Route::There(peer) => {
                let told = peer.drain(worker).await.unwrap_or_else(|_| Err(nobody()));
                // Whoever asked may have hung up.
                let _ = answer.send(told);
            }
        }
    }
}
