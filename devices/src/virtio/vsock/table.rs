//! A bounded table of connections, found by token and by key.

use std::collections::HashMap;

use super::packet::Key;

/// First port number for connections that come from the host.
const FIRST_PORT: u32 = 1 << 30;

/// Names an entry for as long as it lives; never used again for another one within 2^32 insertions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token(pub(super) u64);

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    entry: Option<T>,
}

/// At most `limit` entries.
#[derive(Debug)]
pub(super) struct Table<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    keys: HashMap<Key, Token>,
    limit: usize,
    next_port: u32,
}

impl<T> Table<T> {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            slots: vec![],
            free: vec![],
            keys: HashMap::new(),
            limit,
            next_port: FIRST_PORT,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    /// Adds an entry; gives it back if the table is full.
    pub(super) fn insert(&mut self, entry: T) -> Result<Token, T> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() < self.limit => {
                self.slots.push(Slot {
                    generation: 0,
                    entry: None,
                });
                u32::try_from(self.slots.len().saturating_sub(1)).unwrap_or(u32::MAX)
            }
            None => return Err(entry),
        };
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return Err(entry);
        };
        slot.generation = slot.generation.wrapping_add(1);
        slot.entry = Some(entry);
        Ok(Token(u64::from(slot.generation) << 32 | u64::from(index)))
    }

    fn slot(&mut self, token: Token) -> Option<(u32, &mut Slot<T>)> {
        let index = u32::try_from(token.0 & u64::from(u32::MAX)).ok()?;
        let slot = self.slots.get_mut(index as usize)?;
        (u64::from(slot.generation) == token.0 >> 32).then_some((index, slot))
    }

    pub(super) fn get(&mut self, token: Token) -> Option<&mut T> {
        self.slot(token)?.1.entry.as_mut()
    }

    pub(super) fn remove(&mut self, token: Token) -> Option<T> {
        let (index, slot) = self.slot(token)?;
        let entry = slot.entry.take()?;
        self.free.push(index);
        Some(entry)
    }

    #[cfg(test)]
    pub(super) fn entries(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter_map(|slot| slot.entry.as_ref())
    }

    pub(super) fn find(&self, key: Key) -> Option<Token> {
        self.keys.get(&key).copied()
    }

    /// Makes `key` lead to `token`. Release it before the entry goes.
    pub(super) fn bind(&mut self, key: Key, token: Token) {
        self.keys.insert(key, token);
    }

    pub(super) fn release(&mut self, key: Key) {
        self.keys.remove(&key);
    }

    /// A host port that no connection to `guest` uses.
    pub(super) fn free_port(&mut self, guest: u32) -> u32 {
        // Keys are fewer than `limit` plus one, so this ends.
        loop {
            let host = self.next_port;
            self.next_port = host
                .checked_add(1)
                .filter(|p| *p < FIRST_PORT << 1)
                .unwrap_or(FIRST_PORT);
            if !self.keys.contains_key(&Key { host, guest }) {
                return host;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_until_its_entry_is_removed() {
        let mut table = Table::new(2);
        let a = table.insert('a').unwrap();
        let b = table.insert('b').unwrap();
        assert_eq!(table.insert('c'), Err('c'));
        assert_eq!(
            (table.remove(a), table.remove(a), table.len()),
            (Some('a'), None, 1)
        );
        let c = table.insert('c').unwrap();
        assert_eq!(table.get(a), None);
        assert_eq!(table.get(b), Some(&mut 'b'));
        assert_eq!(table.get(c), Some(&mut 'c'));
        assert_eq!(table.get(Token(u64::MAX)), None);
    }

    #[test]
    fn ports_in_use_are_not_given_again() {
        let mut table: Table<()> = Table::new(4);
        let token = table.insert(()).unwrap();
        let first = table.free_port(5);
        table.bind(
            Key {
                host: first + 1,
                guest: 5,
            },
            token,
        );
        assert_eq!(table.free_port(5), first + 2);
        table.next_port = (FIRST_PORT << 1) - 1;
        assert_eq!(table.free_port(5), (FIRST_PORT << 1) - 1);
        assert_eq!(table.free_port(5), FIRST_PORT);
    }
}
