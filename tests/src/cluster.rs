//! A cluster of processes that a test starts one by one.

use crate::process::{Served, kill, until};
use anyhow::{Context, Result};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A child that ends with the test.
pub struct Ending(Child);

impl Ending {
    pub fn spawn(command: &mut Command) -> Result<Ending> {
        Ok(Ending(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?))
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    pub fn kill(&mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }

    pub fn signal(&self, signal: &str) -> Result<()> {
        kill(self.id(), signal)
    }

    /// Waits for its end; its exit code, if it has one.
    pub fn wait(&mut self) -> Result<Option<i32>> {
        let mut code = None;
        until("the process ends", || match self.0.try_wait() {
            Ok(Some(status)) => {
                code = status.code();
                true
            }
            Ok(None) | Err(_) => false,
        })?;
        Ok(code)
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn free_address() -> Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

/// A folder of the test's own, and the settings of a coordinator in it.
pub struct Place {
    program: String,
    folder: PathBuf,
    api: String,
    node: String,
}

impl Place {
    /// `settings` are further lines of the coordinator's file.
    pub fn new(program: &str, name: &str, model: &Path, settings: &str) -> Result<Place> {
        let folder = std::env::temp_dir().join(format!("conclave-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder)?;
        let place = Place { program: program.into(), folder, api: free_address()?, node: free_address()? };
        let settings = format!(
            "model = {model:?}\nserved_model_name = \"m\"\nlisten = {:?}\nnode_listen = {:?}\ntoken = \"t\"\n{settings}",
            place.api, place.node
        );
        std::fs::write(place.settings(), settings)?;
        Ok(place)
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn settings(&self) -> PathBuf {
        self.folder.join("coordinator.toml")
    }

    pub fn coordinator(&self) -> Result<Served> {
        let settings = self.settings();
        let settings = settings.to_str().context("a path in UTF-8")?;
        let served = Served::command(&self.program, &["coordinator", "--config", settings], &self.api)?;
        until("the API listens", || served.get("/livez").is_ok_and(|a| a.status == 200))?;
        Ok(served)
    }

    pub fn worker(&self, name: &str) -> Result<Ending> {
        let arguments = ["--coordinator", &self.node, "--threads", "1", "--memory-bytes", "268435456", "--name", name];
        Ending::spawn(Command::new(&self.program).arg("worker").args(arguments).env("CONCLAVE_TOKEN", "t"))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
