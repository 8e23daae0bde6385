//! The messages of kubelet's device plugin API v1beta1 that are used (k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1/api.proto).
//! Fields that are not used are left out: protocol buffers skip them.

/// Version of the API.
pub const VERSION: &str = "v1beta1";
/// Health of a device that works.
pub const HEALTHY: &str = "Healthy";
/// Health of a device that does not.
pub const UNHEALTHY: &str = "Unhealthy";

/// To `v1beta1.Registration/Register`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RegisterRequest {
    /// [`VERSION`].
    #[prost(string, tag = "1")]
    pub version: String,
    /// Name of the plugin's socket in kubelet's folder.
    #[prost(string, tag = "2")]
    pub endpoint: String,
    /// The extended resource.
    #[prost(string, tag = "3")]
    pub resource_name: String,
    /// Nothing special is asked for.
    #[prost(message, optional, tag = "4")]
    pub options: Option<PluginOptions>,
}

/// `DevicePluginOptions`: both false.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PluginOptions {
    /// Whether `PreStartContainer` is to be called.
    #[prost(bool, tag = "1")]
    pub pre_start_required: bool,
    /// Whether `GetPreferredAllocation` may be called.
    #[prost(bool, tag = "2")]
    pub get_preferred_allocation_available: bool,
}

/// `Empty`, and every answer without fields.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Empty {}

/// All devices, whenever something changed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ListAndWatchResponse {
    /// The devices.
    #[prost(message, repeated, tag = "1")]
    pub devices: Vec<Device>,
}

/// One device: room for one seat.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Device {
    /// Its name.
    #[prost(string, tag = "1")]
    pub id: String,
    /// [`HEALTHY`] or [`UNHEALTHY`].
    #[prost(string, tag = "2")]
    pub health: String,
}

/// What containers get.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AllocateRequest {
    /// One a container.
    #[prost(message, repeated, tag = "1")]
    pub container_requests: Vec<ContainerAllocateRequest>,
}

/// Devices of one container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerAllocateRequest {
    /// Their names.
    #[prost(string, repeated, tag = "1")]
    pub devices_ids: Vec<String>,
}

/// How containers get their devices.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AllocateResponse {
    /// One a container.
    #[prost(message, repeated, tag = "1")]
    pub container_responses: Vec<ContainerAllocateResponse>,
}

/// How a container gets its devices.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerAllocateResponse {
    /// Folders and files to mount.
    #[prost(message, repeated, tag = "2")]
    pub mounts: Vec<Mount>,
}

/// A bind mount.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Mount {
    /// Where, in the container.
    #[prost(string, tag = "1")]
    pub container_path: String,
    /// What, on the node.
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// Whether nothing may be changed there.
    #[prost(bool, tag = "3")]
    pub read_only: bool,
}
