//! The device plugin `ftvm.dev/seat`: as many devices as the node has room for seats, healthy while KVM works. What a seat gets
//! of it is the folder with the seats' socket.
//!
//! kubelet forgets its plugins when it starts, and removes their sockets: a socket that is gone is made anew, and the plugin
//! registers again.

mod grpc;
mod messages;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt, stream};
use prost::Message;
use tokio::net::UnixListener;
use tokio::sync::watch;

use ftvm_crds::names::{PATH_RUN, RESOURCE_SEAT};

use super::kvm_test::Tested;
use grpc::{Answers, INVALID_ARGUMENT, Refusal, UNIMPLEMENTED};
use messages::{
    AllocateRequest, AllocateResponse, ContainerAllocateResponse, Device, Empty, HEALTHY, ListAndWatchResponse, Mount,
    PluginOptions, RegisterRequest, UNHEALTHY, VERSION,
};

/// Name of the plugin's socket.
const SOCKET: &str = "ftvm.sock";
/// Name of kubelet's.
const KUBELET: &str = "kubelet.sock";
/// How often it is looked whether the socket is still there.
const LOOK: Duration = Duration::from_millis(500);
/// Pause before kubelet is asked again.
const AGAIN: Duration = Duration::from_secs(2);
/// kubelet asks for the devices as soon as it knows the plugin, and goes on to. For so long it may not.
const UNWATCHED_MAX: Duration = Duration::from_secs(30);
/// Memory that a small seat takes: there is no room for more seats than that.
const SEAT_MIB: u64 = 256;
/// Most seats of a node; kubelet's own default is 110 pods.
const SEATS_MAX: u64 = 110;

/// Where things are.
#[derive(Debug, Clone)]
pub struct Options {
    /// kubelet's folder of plugins.
    plugins: PathBuf,
    /// The folder with the seats' socket, on the node.
    folder: PathBuf,
    /// Devices.
    seats: u64,
}

impl Options {
    /// From the daemon's.
    pub fn new(options: &super::Options, folder: PathBuf) -> Options {
        let by_memory = || (memory_mib().unwrap_or(0) / SEAT_MIB).clamp(1, SEATS_MAX);
        Options {
            plugins: options.kubelet.join("device-plugins"),
            folder,
            seats: options.seats.map_or_else(by_memory, u64::from),
        }
    }
}

fn memory_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? >> 10)
}

/// Registers and serves, again and again.
pub async fn run(options: Options, tested: Tested) {
    let socket = options.plugins.join(SOCKET);
    let plugin = Plugin {
        options: options.clone(),
        tested,
        watches: Arc::default(),
    };
    let mut said = String::new();
    loop {
        match serve_once(&socket, &plugin).await {
            Ok(()) => {
                said.clear();
                tracing::info!("kubelet has started anew: registering again");
            }
            Err(why) => {
                if said != why {
                    tracing::warn!("no device plugin: {why}");
                    said = why;
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// Until the socket is gone, which is how kubelet tells that it does not know the plugin any more.
async fn serve_once(socket: &std::path::Path, plugin: &Plugin) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: {error}", socket.display());
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(socket).map_err(failed)?;
    let inode = inode(socket);
    let serving = tokio::spawn(grpc::serve(listener, plugin.clone()));
    let outcome = match plugin.register().await {
        // On a busy node kubelet answers late, and says of the next try that the plugin is connected already.
        Err(why) if !plugin.is_watched() => Err(why),
        _ => {
            tracing::info!(
                devices = plugin.options.seats,
                "registered {RESOURCE_SEAT} with kubelet"
            );
            let mut watched = Instant::now();
            loop {
                if inode.is_none() || self::inode(socket) != inode {
                    break Ok(());
                }
                if plugin.is_watched() {
                    watched = Instant::now();
                } else if watched.elapsed() > UNWATCHED_MAX {
                    break Err(format!(
                        "kubelet has not asked for the devices for {} s",
                        UNWATCHED_MAX.as_secs()
                    ));
                }
                tokio::time::sleep(LOOK).await;
            }
        }
    };
    serving.abort();
    outcome
}

fn inode(socket: &std::path::Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(socket).ok().map(|data| data.ino())
}

#[derive(Clone)]
struct Plugin {
    options: Options,
    tested: Tested,
    /// As many receivers as kubelet has watches of the devices.
    watches: Arc<watch::Sender<()>>,
}

impl Plugin {
    async fn register(&self) -> Result<(), String> {
        let request = RegisterRequest {
            version: VERSION.to_owned(),
            endpoint: SOCKET.to_owned(),
            resource_name: RESOURCE_SEAT.to_owned(),
            options: Some(PluginOptions::default()),
        };
        let kubelet = self.options.plugins.join(KUBELET);
        grpc::call(&kubelet, "/v1beta1.Registration/Register", &request)
            .await
            .map(drop)
    }

    /// Whether kubelet watches the devices: then it knows the plugin.
    fn is_watched(&self) -> bool {
        self.watches.receiver_count() > 0
    }

    fn devices(&self) -> ListAndWatchResponse {
        let health = if self.tested.trouble().is_none() {
            HEALTHY
        } else {
            UNHEALTHY
        };
        let device = |number| Device {
            id: format!("seat-{number}"),
            health: health.to_owned(),
        };
        ListAndWatchResponse {
            devices: (0..self.options.seats).map(device).collect(),
        }
    }

    /// Now, and whenever KVM breaks or works again.
    fn watch(&self) -> Answers {
        let first = stream::once({
            let now = Bytes::from(self.devices().encode_to_vec());
            async move { now }
        });
        let watching = self.watches.subscribe();
        let later = stream::unfold((self.clone(), watching), |(mut plugin, watching)| async move {
            plugin.tested.changed().await;
            let now = Bytes::from(plugin.devices().encode_to_vec());
            Some((now, (plugin, watching)))
        });
        first.chain(later).boxed()
    }

    fn allocate(&self, message: Bytes) -> Result<Answers, Refusal> {
        let request = AllocateRequest::decode(message).map_err(|error| Refusal(INVALID_ARGUMENT, error.to_string()))?;
        let mount = Mount {
            container_path: PATH_RUN.to_owned(),
            host_path: self.options.folder.display().to_string(),
            // A socket may be connected to all the same.
            read_only: true,
        };
        let one = ContainerAllocateResponse { mounts: vec![mount] };
        Ok(grpc::one(&AllocateResponse {
            container_responses: vec![one; request.container_requests.len()],
        }))
    }
}

impl grpc::Service for Plugin {
    fn call(&self, method: &str, message: Bytes) -> Result<Answers, Refusal> {
        match method {
            "/v1beta1.DevicePlugin/GetDevicePluginOptions" => Ok(grpc::one(&PluginOptions::default())),
            "/v1beta1.DevicePlugin/ListAndWatch" => Ok(self.watch()),
            "/v1beta1.DevicePlugin/Allocate" => self.allocate(message),
            "/v1beta1.DevicePlugin/PreStartContainer" => Ok(grpc::one(&Empty {})),
            other => Err(Refusal(UNIMPLEMENTED, format!("no method {other}"))),
        }
    }
}

#[cfg(test)]
mod tests;
