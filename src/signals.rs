//! When to stop: Ctrl-C, SIGTERM, or the end of the process that started this one.

use tokio::signal::unix::{SignalKind, signal};

/// Completes at the first SIGINT or SIGTERM.
pub async fn asked_to_stop() -> std::io::Result<()> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}

/// The same; never where signals can't be had.
pub async fn asked_or_never() {
    if let Err(e) = asked_to_stop().await {
        tracing::error!("no signals: {e}");
        std::future::pending::<()>().await;
    }
}

/// Completes when standard input ends: the parent holds the other end and lets go of it however it dies.
pub async fn stdin_closed() {
    let (closed, wait) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        // Whatever is said is ignored; an error is an end too.
        let _ = std::io::copy(&mut stdin, &mut std::io::sink());
        let _ = closed.send(());
    });
    let _ = wait.await;
}
