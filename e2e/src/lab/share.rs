//! A folder that all nodes share over NFS 4, for the file arbiter: a user-space server in the lab's namespace.
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::{Network, Node, Sandbox};

/// The exported folder and its server; dropping it ends the server.
pub struct Share {
    folder: PathBuf,
    server: Child,
}

impl Share {
    /// Exports `folder/share` to the management network.
    pub(super) fn new(sandbox: &Sandbox, folder: &Path) -> anyhow::Result<Self> {
        let exported = folder.join("share");
        let private = folder.join("ganesha");
        fs::create_dir(&exported)?;
        fs::create_dir(&private)?;
        let configuration = folder.join("ganesha.conf");
        fs::write(&configuration, configure(&exported, &private))?;
        // The server's fixed places, in the lab's own mount namespace.
        for place in ["/run", "/var/lib/nfs"] {
            sandbox.run("mount", &["-t", "tmpfs", "tmpfs", place])?;
        }
        sandbox.run("mkdir", &["-p", "/run/ganesha", "/var/lib/nfs/ganesha"])?;
        let log = folder.join("ganesha.log");
        let output = File::create(&log)?;
        let mut command = Command::new("ganesha.nfsd");
        command
            .arg("-F")
            .arg("-f")
            .arg(&configuration)
            .arg("-p")
            .arg(private.join("pid"))
            .args(["-L", "STDOUT", "-N", "NIV_EVENT"]);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let mut server = sandbox
            .spawn(command)
            .context("is the package nfs-ganesha installed?")?;
        let address = (Network::Management.address(1), 2049).into();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if sandbox.connect(address, Duration::from_secs(1)).is_ok() {
                return Ok(Self {
                    folder: exported,
                    server,
                });
            }
            if server.try_wait()?.is_some() || Instant::now() > deadline {
                bail!(
                    "the NFS server does not start:\n{}",
                    fs::read_to_string(log).unwrap_or_default()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The shared folder on this machine.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Mounts it on /share in a node. Without caches of names and attributes, so that what one node made the other sees.
    ///
    /// # Errors
    /// If the node refuses.
    pub fn mount(&self, node: &Node) -> anyhow::Result<()> {
        let server = Network::Management.address(1);
        node.sh(&format!(
            "mount -i -t nfs4 -o vers=4.1,addr={server},hard,timeo=50,noac,lookupcache=none {server}:/share /share"
        ))?;
        Ok(())
    }

    /// Stops the server in time: its clients wait. For an arbiter that does not answer.
    ///
    /// # Errors
    /// If it is gone.
    pub fn pause(&self) -> anyhow::Result<()> {
        self.signal(rustix::process::Signal::STOP)
    }

    /// Lets a paused server go on.
    ///
    /// # Errors
    /// If it is gone.
    pub fn resume(&self) -> anyhow::Result<()> {
        self.signal(rustix::process::Signal::CONT)
    }

    fn signal(&self, signal: rustix::process::Signal) -> anyhow::Result<()> {
        let pid = rustix::process::Pid::from_child(&self.server);
        rustix::process::kill_process(pid, signal).context("the NFS server is gone")
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is gone after this.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn configure(exported: &Path, private: &Path) -> String {
    format!(
        "NFS_CORE_PARAM {{ Protocols = 4; NFS_Port = 2049; Enable_NLM = false; Enable_RQUOTA = false; }}\n\
         NFSV4 {{ Graceless = true; Delegations = false; RecoveryBackend = fs; RecoveryRoot = {private}; }}\n\
         EXPORT_DEFAULTS {{ Access_Type = RW; Squash = No_Root_Squash; SecType = sys; }}\n\
         EXPORT {{ Export_Id = 1; Path = {exported}; Pseudo = /share; Protocols = 4; Transports = TCP; \
         Attr_Expiration_Time = 0; FSAL {{ Name = VFS; }} }}\n",
        private = private.display(),
        exported = exported.display()
    )
}
