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

#[tokio::test]
async fn devices_are_healthy_once_kvm_proved_to_work() {
    let folder = Folder::new("devices");
    let plugin = Plugin {
        options: options(&folder),
        tested: Tested::start(),
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
