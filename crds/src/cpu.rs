//! What a node publishes of its CPU, for the operator to choose what guests see (`docs/kubernetes.md`).

use std::collections::BTreeMap;

use ftvm_cpu::{CpuBaseline, CpuError, TEXT_BYTES_MAX, TextError};
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

use crate::names::{ANNOTATION_CPU, LABEL_CPU};

/// Most bytes of the annotation.
pub const BYTES_MAX: usize = TEXT_BYTES_MAX + 256;

/// The CPU of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeCpu {
    /// The most that it can give to a guest.
    pub baseline: CpuBaseline,
    /// It can give any frequency of the time stamp counter.
    pub tsc_scaling: bool,
}

/// As the annotation has it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Published {
    tsc_scaling: bool,
    baseline: String,
}

/// What a node publishes of its CPU can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeCpuError {
    /// Longer than [`BYTES_MAX`].
    #[error("its annotation {ANNOTATION_CPU} has {length_bytes} bytes, at most {BYTES_MAX} are read")]
    TooLong {
        /// Its length.
        length_bytes: usize,
    },
    /// Not of the form.
    #[error("its annotation {ANNOTATION_CPU} is malformed ({why})")]
    Malformed {
        /// Where and why.
        why: String,
    },
    /// Not a CPU.
    #[error("its annotation {ANNOTATION_CPU}: {0}")]
    Text(#[from] TextError),
    /// The label is another's.
    #[error("its label {LABEL_CPU} is not that of its annotation")]
    Label,
}

impl NodeCpu {
    /// Value of [`ANNOTATION_CPU`].
    pub fn annotation(&self) -> String {
        let published = Published {
            tsc_scaling: self.tsc_scaling,
            baseline: self.baseline.to_text(),
        };
        // Plain data always encodes.
        serde_json::to_string(&published).unwrap_or_default()
    }

    /// Value of [`LABEL_CPU`]: alike on nodes that can give the same. Where the frequency can be scaled, it makes no difference.
    pub fn label(&self) -> String {
        let mut same = self.baseline.clone();
        if self.tsc_scaling {
            same.tsc_khz = 0;
        }
        let hash = XxHash3_128::oneshot(format!("{} {}", self.tsc_scaling, same.to_text()).as_bytes());
        format!("{:016x}", hash >> 64)
    }

    /// What a node's annotations and labels say; none if it has published nothing.
    ///
    /// # Errors
    /// If they are damaged, or no host's.
    pub fn of(
        annotations: &BTreeMap<String, String>,
        labels: &BTreeMap<String, String>,
    ) -> Result<Option<NodeCpu>, NodeCpuError> {
        let Some(text) = annotations.get(ANNOTATION_CPU) else {
            return Ok(None);
        };
        NodeCpu::read(text, labels.get(LABEL_CPU).map(String::as_str)).map(Some)
    }

    /// From the values of [`ANNOTATION_CPU`] and [`LABEL_CPU`].
    ///
    /// # Errors
    /// If they are damaged, or no host's.
    pub fn read(annotation: &str, label: Option<&str>) -> Result<NodeCpu, NodeCpuError> {
        let length_bytes = annotation.len();
        if length_bytes > BYTES_MAX {
            return Err(NodeCpuError::TooLong { length_bytes });
        }
        // Such an error may have the whole text in it.
        let malformed = |why: String| NodeCpuError::Malformed {
            why: why.chars().take(128).collect(),
        };
        let published: Published = crate::from_json_object(annotation).map_err(malformed)?;
        let cpu = NodeCpu {
            baseline: CpuBaseline::from_text(&published.baseline)?,
            tsc_scaling: published.tsc_scaling,
        };
        if label != Some(&cpu.label()) {
            return Err(NodeCpuError::Label);
        }
        Ok(cpu)
    }

    /// Whether this node can give `wanted` to a guest; otherwise the first thing that it lacks.
    ///
    /// # Errors
    /// What it lacks.
    pub fn gives(&self, wanted: &CpuBaseline) -> Result<(), CpuError> {
        wanted.check(&self.baseline, self.tsc_scaling)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "tsc=2400000 0:d,756e6547,6c65746e,49656e69 1:806e8,800,80982201,781fbff 80000001:0,0,1,2c100800";

    fn cpu(tsc_scaling: bool) -> NodeCpu {
        let baseline = CpuBaseline::from_text(TEXT).unwrap();
        NodeCpu { baseline, tsc_scaling }
    }

    fn published(cpu: &NodeCpu) -> [BTreeMap<String, String>; 2] {
        [(ANNOTATION_CPU, cpu.annotation()), (LABEL_CPU, cpu.label())]
            .map(|(name, text)| [(name.to_owned(), text)].into())
    }

    #[test]
    fn what_is_published_is_read_and_keeps_its_form() {
        let cpu = cpu(true);
        let [annotations, labels] = published(&cpu);
        assert_eq!(
            annotations[ANNOTATION_CPU],
            format!(r#"{{"tscScaling":true,"baseline":"{TEXT}"}}"#)
        );
        // Other releases' daemons and operators must agree.
        assert_eq!(labels[LABEL_CPU], "25a8e34696de7aa0");
        assert_eq!(NodeCpu::of(&annotations, &labels), Ok(Some(cpu)));
        assert_eq!(NodeCpu::of(&BTreeMap::new(), &labels), Ok(None));
    }

    #[test]
    fn a_frequency_tells_nodes_apart_only_where_it_matters() {
        for (scaling, alike) in [(true, true), (false, false)] {
            let (one, mut other) = (cpu(scaling), cpu(scaling));
            other.baseline.tsc_khz += 3;
            assert_eq!(one.label() == other.label(), alike);
        }
        assert_ne!(cpu(true).label(), cpu(false).label());
    }

    #[test]
    fn damage_is_a_named_error() {
        let good = cpu(true);
        let [annotations, labels] = published(&good);
        let read = |text: &str| NodeCpu::read(text, labels.get(LABEL_CPU).map(String::as_str));
        assert_eq!(NodeCpu::of(&annotations, &BTreeMap::new()), Err(NodeCpuError::Label));
        assert_eq!(
            NodeCpu::read(&cpu(false).annotation(), Some(&good.label())),
            Err(NodeCpuError::Label)
        );
        let long = " ".repeat(BYTES_MAX + 1);
        assert!(matches!(read(&long), Err(NodeCpuError::TooLong { .. })));
        for text in ["", "[true,\"\"]", "{", "{}", r#"{"tscScaling":1,"baseline":""}"#] {
            assert!(matches!(read(text), Err(NodeCpuError::Malformed { .. })), "{text}");
        }
        let wordy = format!(r#"{{"tscScaling":"{}"}}"#, "x".repeat(5000));
        assert!(read(&wordy).unwrap_err().to_string().len() < 256);
        let text = r#"{"tscScaling":true,"baseline":"tsc=1"}"#;
        assert!(matches!(read(text), Err(NodeCpuError::Text(TextError::Lacks { .. }))));
    }
}
