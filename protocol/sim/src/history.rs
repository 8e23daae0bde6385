//! States of the guest as a tree: each step is a node, a state contains everything above it.
//!
//! Two forks that made equally many steps are different nodes, so "contains" is "is an ancestor or the same".

/// A state of the guest.
pub type Node = u32;

/// The state before the first step.
pub const ROOT: Node = 0;

#[derive(Debug, Clone, Copy)]
struct Step {
    parent: Node,
    depth: u32,
    /// The last step at or above this one that flushed the disk.
    flushed: Node,
}

/// All states of one run.
#[derive(Debug, Clone)]
pub struct History {
    steps: Vec<Step>,
}

impl Default for History {
    fn default() -> Self {
        Self {
            steps: vec![Step {
                parent: ROOT,
                depth: 0,
                flushed: ROOT,
            }],
        }
    }
}

impl History {
    /// The guest makes a step from this state; with `flush` it also makes its disk durable.
    pub fn step(&mut self, from: Node, flush: bool) -> Node {
        let node = self.steps.len() as Node;
        let above = self.steps[from as usize];
        self.steps.push(Step {
            parent: from,
            depth: above.depth + 1,
            flushed: if flush { node } else { above.flushed },
        });
        node
    }

    /// Does `state` contain everything that `part` is?
    pub fn contains(&self, state: Node, part: Node) -> bool {
        let depth = self.steps[part as usize].depth;
        let mut at = state;
        while self.steps[at as usize].depth > depth {
            at = self.steps[at as usize].parent;
        }
        at == part
    }

    /// The last flush at or above this state.
    pub fn flushed(&self, state: Node) -> Node {
        self.steps[state as usize].flushed
    }

    /// Steps since the beginning.
    pub fn depth(&self, state: Node) -> u32 {
        self.steps[state as usize].depth
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forks_of_equal_length_do_not_contain_each_other() {
        let mut history = History::default();
        let base = history.step(ROOT, true);
        let left = history.step(base, false);
        let right = history.step(base, false);
        assert!(history.contains(left, base) && history.contains(left, left));
        assert!(!history.contains(left, right) && !history.contains(base, left));
        assert_eq!(history.flushed(left), base);
        assert_eq!(history.depth(right), 2);
    }
}
