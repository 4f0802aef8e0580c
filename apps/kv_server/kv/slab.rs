// SPDX-License-Identifier: MIT OR Apache-2.0
//! Numbered slots for entries. An entry stays in its slot for as long as it lives.
//!
//! That is what makes a scan simple: whoever walks the slots in order meets every entry that lives
//! all the while, once, whatever else comes and goes.

/// Entries in slots.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    slots: Vec<Slot<T>>,
    first_free: Option<u32>,
}

#[derive(Debug)]
enum Slot<T> {
    Taken(T),
    Free { next: Option<u32> },
}

impl<T> Slab<T> {
    pub(crate) fn new() -> Self {
        Self { slots: Vec::new(), first_free: None }
    }

    /// How many slots there are, free ones among them.
    pub(crate) fn slot_count(&self) -> usize {
        self.slots.len()
    }

    /// Puts an entry into a free slot. `None`: there are as many entries as numbers.
    pub(crate) fn insert(&mut self, entry: T) -> Option<u32> {
        let Some(index) = self.first_free else {
            let index = u32::try_from(self.slots.len()).ok()?;
            self.slots.push(Slot::Taken(entry));
            return Some(index);
        };
        let slot = &mut self.slots[index as usize];
        if let Slot::Free { next } = *slot {
            self.first_free = next;
        }
        *slot = Slot::Taken(entry);
        Some(index)
    }

    pub(crate) fn get(&self, index: u32) -> Option<&T> {
        match self.slots.get(index as usize) {
            Some(Slot::Taken(entry)) => Some(entry),
            _ => None,
        }
    }

    pub(crate) fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        match self.slots.get_mut(index as usize) {
            Some(Slot::Taken(entry)) => Some(entry),
            _ => None,
        }
    }

    pub(crate) fn remove(&mut self, index: u32) -> Option<T> {
        let slot = self.slots.get_mut(index as usize)?;
        if matches!(slot, Slot::Free { .. }) {
            return None;
        }
        let taken = std::mem::replace(slot, Slot::Free { next: self.first_free });
        self.first_free = Some(index);
        match taken {
            Slot::Taken(entry) => Some(entry),
            Slot::Free { .. } => None,
        }
    }
}
