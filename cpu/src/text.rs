//! A baseline as one line of text, for objects of a cluster: `tsc=KHZ LEAF[.SUBLEAF]:EAX,EBX,ECX,EDX …`, leaves and registers in
//! hexadecimal, ascending. Where ECX matters, the subleaf is written.

use std::fmt::Write as _;

use crate::{CpuBaseline, CpuidLeaf, MAX_LEAVES, Register, feature_name};

/// Longest text that is read. The longest of a CPU of today has some 2 KiB.
pub const TEXT_BYTES_MAX: usize = 16 * 1024;

/// What every CPU for 64-bit guests has.
const REQUIRED: &[(u32, Register, &[u32])] = &[
    // fpu, tsc, msr, pae, cx8, apic, cmov, fxsr, sse, sse2
    (0x1, Register::Edx, &[0, 4, 5, 6, 8, 9, 15, 24, 25, 26]),
    // lm
    (0x8000_0001, Register::Edx, &[29]),
];

/// A text that is no baseline. It was written by another node: it is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// Longer than [`TEXT_BYTES_MAX`].
    #[error("a CPU as text has {length_bytes} bytes, at most {TEXT_BYTES_MAX} are read")]
    TooLong {
        /// Its length.
        length_bytes: usize,
    },
    /// Not of the form.
    #[error("a CPU as text has `{word}`, where {expected} is expected")]
    Malformed {
        /// What is there.
        word: String,
        /// What should be.
        expected: &'static str,
    },
    /// It could not come from a host.
    #[error("a CPU as text shows {what}, which no guest is shown")]
    Beyond {
        /// What.
        what: String,
    },
    /// Too little for any guest.
    #[error("a CPU as text lacks {feature}, which every 64-bit CPU has")]
    Lacks {
        /// What.
        feature: String,
    },
}

fn malformed(word: &str, expected: &'static str) -> TextError {
    TextError::Malformed {
        word: word.chars().take(64).collect(),
        expected,
    }
}

impl CpuBaseline {
    /// As text; [`CpuBaseline::from_text`] reads it.
    pub fn to_text(&self) -> String {
        let mut text = format!("tsc={}", self.tsc_khz);
        for leaf in &self.leaves {
            // Writing to a String can't fail.
            let _ = write!(text, " {:x}", leaf.leaf);
            if leaf.indexed {
                let _ = write!(text, ".{:x}", leaf.subleaf);
            }
            let [eax, ebx, ecx, edx] = leaf.registers;
            let _ = write!(text, ":{eax:x},{ebx:x},{ecx:x},{edx:x}");
        }
        text
    }

    /// From text of anybody: what it gives could be a host's.
    ///
    /// # Errors
    /// If it is too long, malformed, shows what no guest is shown, or lacks what every 64-bit CPU has.
    pub fn from_text(text: &str) -> Result<CpuBaseline, TextError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(TextError::TooLong {
                length_bytes: text.len(),
            });
        }
        let mut words = text.split(' ');
        let first = words.next().unwrap_or_default();
        let tsc_khz = first.strip_prefix("tsc=").and_then(|khz| khz.parse::<u32>().ok());
        // As it is written: without signs or leading zeros.
        let tsc_khz = tsc_khz.filter(|khz| *khz > 0 && format!("tsc={khz}") == first);
        let tsc_khz = tsc_khz.ok_or_else(|| malformed(first, "tsc=KHZ"))?;
        let leaves = words
            .map(|word| leaf(word).ok_or_else(|| malformed(word, "LEAF[.SUBLEAF]:EAX,EBX,ECX,EDX")))
            .collect::<Result<Vec<_>, _>>()?;
        if leaves.len() > MAX_LEAVES {
            let what = format!("{} leaves of CPUID", leaves.len());
            return Err(TextError::Beyond { what });
        }
        let baseline = CpuBaseline { leaves, tsc_khz };
        baseline.could_be_shown()?;
        Ok(baseline)
    }

    /// Filtering what a guest may be shown leaves it as it is.
    fn could_be_shown(&self) -> Result<(), TextError> {
        let shown = CpuBaseline::of_supported(self.leaves.iter().copied(), self.tsc_khz);
        let pairs = self
            .leaves
            .iter()
            .zip(shown.leaves.iter().map(Some).chain(std::iter::repeat(None)));
        if let Some((leaf, _)) = pairs.into_iter().find(|(leaf, shown)| Some(*leaf) != *shown) {
            let what = format!(
                "leaf {:#x}.{} of CPUID as {:x?}, or in that place",
                leaf.leaf, leaf.subleaf, leaf.registers
            );
            return Err(TextError::Beyond { what });
        }
        for (leaf, register, bits) in REQUIRED {
            let has = self.register(*leaf, 0, *register);
            if let Some(bit) = bits.iter().find(|bit| has & (1 << **bit) == 0) {
                let feature = feature_name(*leaf, 0, *register, *bit);
                return Err(TextError::Lacks { feature });
            }
        }
        Ok(())
    }
}

fn leaf(word: &str) -> Option<CpuidLeaf> {
    let (place, answer) = word.split_once(':')?;
    let (leaf, subleaf) = match place.split_once('.') {
        Some((leaf, subleaf)) => (hex(leaf)?, Some(hex(subleaf)?)),
        None => (hex(place)?, None),
    };
    let mut parts = answer.split(',');
    let mut registers = [0; 4];
    for register in &mut registers {
        *register = hex(parts.next()?)?;
    }
    parts.next().is_none().then_some(CpuidLeaf {
        leaf,
        subleaf: subleaf.unwrap_or(0),
        indexed: subleaf.is_some(),
        registers,
    })
}

/// As it is written: lower case, without signs or leading zeros.
fn hex(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let written = digits && (text == "0" || !text.starts_with('0'));
    written.then(|| u32::from_str_radix(text, 16).ok())?
}
