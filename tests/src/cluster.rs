//! A cluster of processes that a test starts one by one.

use crate::process::{Served, kill, until};
use anyhow::{Context, Result};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

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

/// Whether this machine lets a test's processes have a host name of their own; says loudly if not.
pub fn hosts_apart() -> bool {
    let tried = Command::new("unshare").args(["--uts", "hostname", "apart"]).output();
    let can = tried.is_ok_and(|output| output.status.success());
    if !can {
        eprintln!("SKIPPED: `unshare --uts hostname apart` fails here (it needs root), so no two hosts can be played");
    }
    can
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
        place.configure(model, settings)?;
        Ok(place)
    }

    /// Writes the coordinator's file anew, with these further lines.
    pub fn configure(&self, model: &Path, settings: &str) -> Result<()> {
        let settings = format!(
            "model = {model:?}\nserved_model_name = \"m\"\nlisten = {:?}\nnode_listen = {:?}\ntoken = \"t\"\n{settings}",
            self.api, self.node
        );
        std::fs::write(self.settings(), settings)?;
        Ok(())
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

    /// A worker told by a file with these further lines, and what it says on standard error.
    pub fn worker_with(&self, name: &str, settings: &str) -> Result<(Ending, Receiver<String>)> {
        self.worker_by(Command::new(&self.program), name, settings)
    }

    /// The same, also told by these variables.
    pub fn worker_told(
        &self,
        variables: &[(&str, &str)],
        name: &str,
        settings: &str,
    ) -> Result<(Ending, Receiver<String>)> {
        let mut command = Command::new(&self.program);
        command.envs(variables.iter().copied());
        self.worker_by(command, name, settings)
    }

    /// The same on a host of another name, as far as its processes can see: its ranks share no memory with others'.
    pub fn worker_apart(&self, name: &str, settings: &str) -> Result<(Ending, Receiver<String>)> {
        let mut command = Command::new("unshare");
        command.args(["--uts", "sh", "-c", "hostname \"$0\" && exec \"$@\"", name, &self.program]);
        self.worker_by(command, name, settings)
    }

    /// The same of any program, with any token.
    pub fn worker_of(
        &self,
        program: &str,
        name: &str,
        token: &str,
        settings: &str,
    ) -> Result<(Ending, Receiver<String>)> {
        let mut command = Command::new(program);
        command.env("CONCLAVE_TOKEN", token);
        self.worker_by(command, name, settings)
    }

    fn worker_by(&self, mut command: Command, name: &str, settings: &str) -> Result<(Ending, Receiver<String>)> {
        let file = self.folder.join(format!("{name}.toml"));
        let common =
            format!("coordinator = {:?}\nname = {name:?}\ntoken = \"t\"\nmemory_bytes = 268435456\n", self.node);
        std::fs::write(&file, common + settings)?;
        command.arg("worker").arg("--config").arg(file).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let stderr = BufReader::new(child.stderr.take().context("piped")?);
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            stderr.lines().map_while(std::result::Result::ok).try_for_each(|line| sender.send(line))
        });
        Ok((Ending(child), lines))
    }

    /// Where its API listens.
    pub fn api(&self) -> &str {
        &self.api
    }

    /// Where its node plane listens.
    pub fn node(&self) -> &str {
        &self.node
    }

    pub fn worker(&self, name: &str) -> Result<Ending> {
        self.worker_at(name, &self.node)
    }

    /// A worker that looks for a coordinator at these addresses.
    pub fn worker_at(&self, name: &str, coordinators: &str) -> Result<Ending> {
        let arguments =
            ["--coordinator", coordinators, "--threads", "1", "--memory-bytes", "268435456", "--name", name];
        Ending::spawn(Command::new(&self.program).arg("worker").args(arguments).env("CONCLAVE_TOKEN", "t"))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
