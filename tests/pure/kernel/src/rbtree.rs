// SPDX-License-Identifier: GPL-2.0

//! A sorted tree whose nodes are allocated by its user.

use crate::alloc::{allocate, AllocError, Flags};
use std::collections::BTreeMap;

/// A sorted tree.
pub struct RBTree<K, V>(BTreeMap<K, V>);

/// Memory for a node.
pub struct RBTreeNodeReservation<K, V>(std::marker::PhantomData<(K, V)>);

/// A node that is in no tree.
pub struct RBTreeNode<K, V>(K, V);

impl<K, V> RBTreeNodeReservation<K, V> {
    /// Allocates memory for a node.
    pub fn new(flags: Flags) -> Result<Self, AllocError> {
        allocate(flags)?;
        Ok(Self(std::marker::PhantomData))
    }

    /// Makes it a node.
    pub fn into_node(self, key: K, value: V) -> RBTreeNode<K, V> {
        RBTreeNode(key, value)
    }
}

impl<K, V> RBTreeNode<K, V> {
    /// Its key and value.
    pub fn to_key_value(self) -> (K, V) {
        (self.0, self.1)
    }
}

impl<K: Ord, V> RBTree<K, V> {
    /// An empty tree.
    pub fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// Puts a node in, and returns the one that had its place.
    pub fn insert(&mut self, node: RBTreeNode<K, V>) -> Option<RBTreeNode<K, V>>
    where
        K: Clone,
    {
        let RBTreeNode(key, value) = node;
        let old = self.0.insert(key.clone(), value)?;
        Some(RBTreeNode(key, old))
    }

    /// Allocates a node, and puts it in.
    pub fn try_create_and_insert(
        &mut self,
        key: K,
        value: V,
        flags: Flags,
    ) -> Result<Option<RBTreeNode<K, V>>, AllocError>
    where
        K: Clone,
    {
        let node = RBTreeNodeReservation::new(flags)?.into_node(key, value);
        Ok(self.insert(node))
    }

    /// A value.
    pub fn get(&self, key: &K) -> Option<&V> {
        self.0.get(key)
    }

    /// A value.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.0.get_mut(key)
    }

    /// Takes a node out.
    pub fn remove_node(&mut self, key: &K) -> Option<RBTreeNode<K, V>> {
        let (key, value) = self.0.remove_entry(key)?;
        Some(RBTreeNode(key, value))
    }
}

impl<K: Ord, V> Default for RBTree<K, V> {
    fn default() -> Self {
        Self::new()
    }
}
