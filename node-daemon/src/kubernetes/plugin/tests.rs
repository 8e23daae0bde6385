//! The plugin as a kubelet sees it; that the real one takes it is tested with the real one (`e2e/tests`).

use super::*;
use crate::testing::Folder;
use std::sync::{Arc, Mutex};

/// The registering side of a kubelet.
#[derive(Clone, Default)]
struct Kubelet(Arc<Mutex<Vec<RegisterRequest>>>);

impl grpc::Service for Kubelet {
    fn call(&self, method: &str, message: Bytes) -> Result<Answers, Refusal> {
        assert_eq!(method, "/v1beta1.Registration/Register");
        let request = RegisterRequest::decode(message).map_err(|error| Refusal(INVALID_ARGUMENT, error.to_string()))?;
        self.0.lock().unwrap().push(request);
        Ok(grpc::one(&Empty {}))
    }
}

async fn wait(what: &str, probe: impl Fn() -> bool) {
    for _ in 0..6000 {
        if probe() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("waited in vain until {what}");
}

fn options(folder: &Folder) -> Options {
    Options {
        plugins: folder.path().to_owned(),
        folder: "/var/lib/ftvm/seat-socket".into(),
        seats: 3,
    }
}

#[tokio::test]
async fn it_registers_again_whenever_kubelet_forgot_it() {
    let folder = Folder::new("plugin");
    let running = tokio::spawn(run(options(&folder), Tested::start()));
    let kubelet = Kubelet::default();
    let registered = |count: usize| {
        let kubelet = kubelet.clone();
        move || kubelet.0.lock().unwrap().len() == count
    };
    // kubelet starts after the plugin, and twice.
    let listener = UnixListener::bind(folder.path().join(KUBELET)).unwrap();
    tokio::spawn(grpc::serve(listener, kubelet.clone()));
    wait("it registers", registered(1)).await;
    std::fs::remove_file(folder.path().join(SOCKET)).unwrap();
    wait("it registers again", registered(2)).await;
    let request = kubelet.0.lock().unwrap()[1].clone();
    assert_eq!(
        (
            request.version.as_str(),
            request.endpoint.as_str(),
            request.resource_name.as_str()
        ),
        ("v1beta1", "ftvm.sock", "ftvm.dev/seat")
    );
    let socket = folder.path().join(SOCKET);
    let allocate = AllocateRequest {
        container_requests: vec![messages::ContainerAllocateRequest {
            devices_ids: vec!["seat-1".to_owned()],
        }],
    };
    let answer = grpc::call(&socket, "/v1beta1.DevicePlugin/Allocate", &allocate)
        .await
        .unwrap();
    let answer = AllocateResponse::decode(answer).unwrap();
    let mount = &answer.container_responses[0].mounts[0];
    assert_eq!((mount.container_path.as_str(), mount.read_only), ("/run/ftvm", true));
    assert_eq!(mount.host_path, "/var/lib/ftvm/seat-socket");
    let refused = grpc::call(&socket, "/v1beta1.DevicePlugin/Nothing", &Empty {}).await;
    assert!(refused.is_err_and(|why| why.contains("12 no method")));
    running.abort();
}

/// A kubelet that refuses whoever registers, for it is connected already; it may be.
#[derive(Clone)]
struct Connected {
    plugin: std::path::PathBuf,
    watches: bool,
    asked: Arc<Mutex<usize>>,
}

impl grpc::Service for Connected {
    fn call(&self, _: &str, _: Bytes) -> Result<Answers, Refusal> {
        *self.asked.lock().unwrap() += 1;
        if self.watches {
            let plugin = self.plugin.clone();
            tokio::spawn(async move { grpc::call(&plugin, "/v1beta1.DevicePlugin/ListAndWatch", &Empty {}).await });
        }
        Err(Refusal(2, "device plugin already connected".to_owned()))
    }
}

#[tokio::test]
async fn who_watches_the_devices_knows_the_plugin() {
    for watches in [true, false] {
        let folder = Folder::new("connected");
        let kubelet = Connected {
            plugin: folder.path().join(SOCKET),
            watches,
            asked: Arc::default(),
        };
        let listener = UnixListener::bind(folder.path().join(KUBELET)).unwrap();
        let serving = tokio::spawn(grpc::serve(listener, kubelet.clone()));
        let running = tokio::spawn(run(options(&folder), Tested::start()));
        let asked = || *kubelet.asked.lock().unwrap();
        // Its watch may come after its answer was read: then it is asked once more, no later.
        wait("it is asked", || asked() == 1).await;
        tokio::time::sleep(3 * AGAIN).await;
        assert_eq!(asked() <= 2, watches, "asked {} times", asked());
        running.abort();
        serving.abort();
    }
}

#[tokio::test]
async fn devices_are_healthy_once_kvm_proved_to_work() {
    let folder = Folder::new("devices");
    let plugin = Plugin {
        options: options(&folder),
        tested: Tested::start(),
        watches: Arc::default(),
    };
    let mut answers = plugin.watch();
    let mut last = ListAndWatchResponse::default();
    for _ in 0..2 {
        last = ListAndWatchResponse::decode(answers.next().await.unwrap()).unwrap();
        if last.devices[0].health == HEALTHY {
            break;
        }
    }
    assert_eq!(last.devices.len(), 3);
    assert!(last.devices.iter().all(|device| device.health == HEALTHY), "{last:?}");
}

/// The health that all devices have, by the next answer.
async fn next_health(answers: &mut Answers) -> String {
    let answer = ListAndWatchResponse::decode(answers.next().await.unwrap()).unwrap();
    assert_eq!(answer.devices.len(), 3);
    let health = answer.devices[0].health.clone();
    assert!(
        answer.devices.iter().all(|device| device.health == health),
        "{answer:?}"
    );
    health
}

#[tokio::test]
async fn no_device_is_healthy_before_the_first_self_test_has_passed() {
    let folder = Folder::new("untested");
    let (tested, pass) = Tested::held();
    let plugin = Plugin {
        options: options(&folder),
        tested,
        watches: Arc::default(),
    };
    let mut answers = plugin.watch();
    assert_eq!(next_health(&mut answers).await, UNHEALTHY);
    pass.send(()).unwrap();
    assert_eq!(next_health(&mut answers).await, HEALTHY);
}

const BROKEN: &str = "FTVM_TEST_BROKEN_KVM";

/// `/dev/kvm` is there and is no KVM, in a mount namespace of this test's own; then it is one, and then again not.
#[test]
fn no_device_is_healthy_while_kvm_is_broken() {
    if std::env::var_os(BROKEN).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        return runtime.unwrap().block_on(break_and_mend());
    }
    let mut command = std::process::Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let script = "mount --bind /dev/null /dev/kvm && exec \"$@\"";
    let output = command
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "kubernetes::plugin::tests::no_device_is_healthy_while_kvm_is_broken",
        ])
        .arg("--nocapture")
        .env(BROKEN, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

async fn break_and_mend() {
    let run = |program: &str, arguments: &[&str]| {
        let status = std::process::Command::new(program).args(arguments).status().unwrap();
        assert!(status.success(), "{program} {arguments:?}");
    };
    let folder = Folder::new("broken");
    let plugin = Plugin {
        options: options(&folder),
        tested: Tested::every(Duration::from_millis(20), super::super::kvm_test::test),
        watches: Arc::default(),
    };
    let mut answers = plugin.watch();
    assert_eq!(next_health(&mut answers).await, UNHEALTHY);
    wait("it was tested", || {
        plugin
            .tested
            .trouble()
            .is_some_and(|why| why.contains("no virtual machine"))
    })
    .await;
    assert_eq!(next_health(&mut answers).await, UNHEALTHY);
    // A self-test may have it open.
    run("umount", &["--lazy", "/dev/kvm"]);
    assert_eq!(next_health(&mut answers).await, HEALTHY);
    assert_eq!(plugin.tested.trouble(), None);
    run("mount", &["--bind", "/dev/null", "/dev/kvm"]);
    assert_eq!(next_health(&mut answers).await, UNHEALTHY);
}
