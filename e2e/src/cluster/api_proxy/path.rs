//! What a request is about, from its line and its credentials.
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use hyper::Uri;
use serde_json::Value;

/// Who asks.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Asker {
    /// As the API server names them; empty if nobody says.
    pub user: String,
    /// The node of a service account's pod.
    pub node: Option<String>,
    /// The pod itself.
    pub pod: Option<String>,
}

/// A request as far as a choice depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Who asks.
    pub asker: Asker,
    /// `GET`, `PUT`, …
    pub method: String,
    /// Plural of the kind; empty for paths that are no objects.
    pub resource: String,
    /// Its namespace, if it is in one.
    pub namespace: Option<String>,
    /// Its name; a list, or what is made, has none.
    pub name: Option<String>,
    /// Such as `status`.
    pub subresource: Option<String>,
    /// Whether the answer goes on as long as something happens.
    pub watch: bool,
    /// Whether it is such an answer that goes on already, and not a question.
    pub running: bool,
}

impl Asked {
    /// From method, URI and who asks.
    pub(in crate::cluster) fn new(asker: Asker, method: &str, uri: &Uri) -> Self {
        let query = uri.query().unwrap_or_default();
        let watch = query.split('&').any(|word| word == "watch=true" || word == "watch=1");
        let mut words = uri.path().split('/').filter(|word| !word.is_empty()).map(str::to_owned);
        let prefix = match words.next().as_deref() {
            Some("api") => words.next(),
            Some("apis") => words.next().and_then(|_| words.next()),
            _ => None,
        };
        let mut rest: Vec<String> = prefix.map(|_| words.collect()).unwrap_or_default();
        let namespaced = rest.len() > 2 && rest[0] == "namespaces";
        let namespace = namespaced.then(|| rest.drain(..2).nth(1)).flatten();
        let mut rest = rest.into_iter();
        Self {
            asker,
            method: method.to_owned(),
            resource: rest.next().unwrap_or_default(),
            namespace,
            name: rest.next(),
            subresource: rest.next(),
            watch,
            running: false,
        }
    }

    /// Whether it is none of the requests that are falsified.
    pub(super) fn passes_always(&self) -> bool {
        self.resource.is_empty()
    }

    /// Whether it reads many objects, once.
    pub(super) fn lists(&self) -> bool {
        self.method == "GET" && self.name.is_none() && !self.watch
    }

    /// Whether it changes something.
    pub(super) fn writes(&self) -> bool {
        self.method != "GET"
    }

    /// Whether it reads one object.
    pub(super) fn reads_one(&self) -> bool {
        self.method == "GET" && self.name.is_some() && self.subresource.is_none() && !self.watch
    }
}

/// Whose service account's token it is. Nobody checks it here: the API server does.
pub(super) fn asker_of_token(authorization: &str) -> Option<Asker> {
    let payload = authorization.strip_prefix("Bearer ")?.split('.').nth(1)?;
    let payload: Value = serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(payload).ok()?).ok()?;
    Some(Asker {
        user: payload["sub"].as_str()?.to_owned(),
        node: payload["kubernetes.io"]["node"]["name"].as_str().map(str::to_owned),
        pod: payload["kubernetes.io"]["pod"]["name"].as_str().map(str::to_owned),
    })
}

/// A parameter of a query, as it stands there.
pub(super) fn parameter<'a>(uri: &'a Uri, name: &str) -> Option<&'a str> {
    let words = uri.query().unwrap_or_default().split('&');
    words
        .filter_map(|word| word.split_once('='))
        .find_map(|(key, value)| (key == name).then_some(value))
}

/// The same list as it was in this version, which the API server tells as long as its store knows it.
pub(super) fn as_of(uri: &Uri, version: u64) -> anyhow::Result<Uri> {
    let query = uri.query().unwrap_or_default().split('&');
    let mut query: Vec<&str> = query
        .filter(|word| !word.is_empty() && !word.starts_with("resourceVersion"))
        .collect();
    let exactly = format!("resourceVersion={version}&resourceVersionMatch=Exact");
    query.push(&exactly);
    Ok(format!("{}?{}", uri.path(), query.join("&")).parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(uri: &str) -> Asked {
        Asked::new(Asker::default(), "GET", &uri.parse().unwrap())
    }

    #[test]
    fn paths_are_taken_apart() {
        let lease = asked("/apis/coordination.k8s.io/v1/namespaces/demo/leases/web?pretty=true");
        assert_eq!(
            (lease.resource.as_str(), lease.name.as_deref()),
            ("leases", Some("web"))
        );
        assert_eq!(lease.namespace.as_deref(), Some("demo"));
        assert!(lease.reads_one() && !lease.passes_always());
        let status = asked("/apis/ftvm.dev/v1alpha1/namespaces/demo/faulttolerantvms/web/status");
        assert_eq!(status.subresource.as_deref(), Some("status"));
        assert!(!status.reads_one());
        let node = asked("/api/v1/nodes/n1");
        assert_eq!((node.resource.as_str(), node.name.as_deref()), ("nodes", Some("n1")));
        let namespace = asked("/api/v1/namespaces/demo");
        assert_eq!(
            (namespace.resource.as_str(), namespace.name.as_deref()),
            ("namespaces", Some("demo"))
        );
        let pods = asked("/api/v1/pods?labelSelector=a%3Db&watch=true");
        assert!(pods.watch && !pods.passes_always() && pods.name.is_none() && !pods.lists());
        assert!(asked("/api/v1/pods?limit=500").lists() && !lease.lists());
        for other in ["/readyz", "/apis", "/apis/apps/v1", "/api/v1", "/version"] {
            assert!(asked(other).passes_always(), "{other}");
        }
    }

    #[test]
    fn a_list_is_asked_for_as_it_was() {
        let uri: Uri = "/api/v1/pods?limit=500&resourceVersion=0&labelSelector=a%3Db&resourceVersionMatch=NotOlderThan"
            .parse()
            .unwrap();
        assert_eq!(parameter(&uri, "resourceVersion"), Some("0"));
        let old = as_of(&uri, 77).unwrap();
        let expected = "/api/v1/pods?limit=500&labelSelector=a%3Db&resourceVersion=77&resourceVersionMatch=Exact";
        assert_eq!(old.to_string(), expected);
        let all = as_of(&"/api/v1/pods".parse().unwrap(), 7).unwrap();
        assert_eq!(all.query(), Some("resourceVersion=7&resourceVersionMatch=Exact"));
    }

    #[test]
    fn a_token_says_whose_it_is() {
        let payload =
            r#"{"sub":"system:serviceaccount:a:b","kubernetes.io":{"node":{"name":"n2"},"pod":{"name":"p"}}}"#;
        let token = format!("Bearer e30.{}.c2ln", BASE64_URL_SAFE_NO_PAD.encode(payload));
        let asker = asker_of_token(&token).expect("a service account's token");
        assert_eq!(asker.user, "system:serviceaccount:a:b");
        assert_eq!((asker.node.as_deref(), asker.pod.as_deref()), (Some("n2"), Some("p")));
        for nobody in ["Bearer opaque", "Basic YTpi", "Bearer a.%.c"] {
            assert_eq!(asker_of_token(nobody), None);
        }
    }
}
