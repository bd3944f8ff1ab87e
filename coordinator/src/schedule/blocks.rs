//! One lane's cache blocks: who holds them, which may be reused, and which prefixes they still contain. Not the cache
//! itself: that lies on the ranks; here are only its numbers.
//!
//! ```text
//!  allocate          register (full, computed)
//! free ------> held -------------------------> held + cached
//!   ^            |                                  |   ^
//!   |   release  |                          release |   | share
//!   +------------+                                  v   |
//!   +------------------- evicted by allocate --- free + cached
//! ```

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hasher};

use model::fault::{Fault, FaultKind};
use model::plan::BLOCK_TOKENS;
use model::step::BlockId;

/// Hash of a block, given its parent's (or the root's) hash. Only finds candidates: tokens decide.
pub type BlockHash = fn(parent: u64, tokens: &[u32]) -> u64;

/// The hash used in production. Its value never leaves the process.
pub fn chained_hash(parent: u64, tokens: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write_u64(parent);
    for &token in tokens {
        hasher.write_u32(token);
    }
    hasher.finish()
}

/// What stands before a block: nothing but the tenant's salt, or one cached block. The entry number is never used
/// twice, so a block that was evicted and refilled is not taken for its former self.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parent {
    Root { salt: u64 },
    Cached { block: BlockId, entry: u64 },
}

#[derive(Debug, Clone, Default)]
struct Block {
    holders: u32,
    /// When it was released last; 0 if it has nothing worth keeping.
    released: u64,
    cached: Option<Cached>,
}

#[derive(Debug, Clone)]
struct Cached {
    entry: u64,
    hash: u64,
    parent: Parent,
    tokens: Box<[u32]>,
}

/// The pool of one lane.
#[derive(Debug, Clone)]
pub struct BlockPool {
    blocks: Vec<Block>,
    /// Blocks without holders, those to reuse first at the front: empty ones, then the longest released.
    free: BTreeSet<(u64, BlockId)>,
    /// Cached blocks by hash; several may share one.
    index: BTreeSet<(u64, BlockId)>,
    releases: u64,
    entries: u64,
}

impl BlockPool {
    pub fn new(blocks: usize) -> BlockPool {
        let count = u32::try_from(blocks).expect("a lane has fewer than 2^32 blocks");
        BlockPool {
            blocks: vec![Block::default(); blocks],
            free: (0..count).map(|block| (0, BlockId(block))).collect(),
            index: BTreeSet::new(),
            releases: 0,
            entries: 0,
        }
    }

    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that somebody holds.
    pub fn used(&self) -> usize {
        self.blocks.len() - self.free.len()
    }

    /// Blocks that [`Self::allocate`] could hand out, cached ones included.
    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// The cached blocks that hold the longest prefix of `tokens`, and the last of them as a parent. `hashes` are the
    /// chained hashes of the leading full blocks of `tokens` that may be taken. Nobody holds the blocks yet.
    pub fn longest_prefix(&self, salt: u64, hashes: &[u64], tokens: &[u32]) -> (Vec<BlockId>, Parent) {
        let mut parent = Parent::Root { salt };
        let mut found = Vec::new();
        for (&hash, tokens) in hashes.iter().zip(tokens.chunks_exact(BLOCK_TOKENS)) {
            let Some(block) = self.find(parent, hash, tokens) else { break };
            parent = self.as_parent(block).expect("a block that was found is cached");
            found.push(block);
        }
        (found, parent)
    }

    /// How many of `blocks` nobody holds, and so count as available.
    pub fn unheld(&self, blocks: &[BlockId]) -> usize {
        blocks.iter().filter(|block| self.at(**block).holders == 0).count()
    }

    /// Adds a holder to a cached block.
    pub fn share(&mut self, block: BlockId) {
        let entry = self.at_mut(block);
        assert!(entry.cached.is_some(), "block {} is shared but not cached", block.0);
        entry.holders += 1;
        if entry.holders == 1 {
            let key = (entry.released, block);
            assert!(self.free.remove(&key), "block {} had no holder and was not free", block.0);
        }
    }

    /// An empty block with one holder; evicts the longest released prefix when no block is empty.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let (_, block) = self.free.pop_first()?;
        let entry = self.at_mut(block);
        assert_eq!(entry.holders, 0, "block {} was free and held", block.0);
        entry.holders = 1;
        if let Some(cached) = entry.cached.take() {
            self.index.remove(&(cached.hash, block));
        }
        Some(block)
    }

    /// Takes a holder away. A cached block is kept until it is the longest released one.
    pub fn release(&mut self, block: BlockId) {
        self.releases += 1;
        let released = self.releases;
        let entry = self.at_mut(block);
        assert!(entry.holders > 0, "block {} is released but nobody holds it", block.0);
        entry.holders -= 1;
        if entry.holders == 0 {
            entry.released = if entry.cached.is_some() { released } else { 0 };
            let key = (entry.released, block);
            self.free.insert(key);
        }
    }

    /// Makes a held, computed, full block findable, and returns it as its child's parent. Where an equal block is cached
    /// already, that one is returned and `block` stays private. `None` when the parent was evicted meanwhile: then the
    /// chain ends here, since its prefix can no longer be found.
    pub fn register(&mut self, block: BlockId, parent: Parent, hash: u64, tokens: &[u32]) -> Option<Parent> {
        assert_eq!(tokens.len(), BLOCK_TOKENS, "only a full block can be cached");
        assert!(self.at(block).holders > 0 && self.at(block).cached.is_none(), "block {} can't be cached", block.0);
        if let Parent::Cached { block: before, entry } = parent
            && self.at(before).cached.as_ref().is_none_or(|cached| cached.entry != entry)
        {
            return None;
        }
        if let Some(twin) = self.find(parent, hash, tokens) {
            return self.as_parent(twin);
        }
        self.entries += 1;
        let cached = Cached { entry: self.entries, hash, parent, tokens: tokens.into() };
        self.at_mut(block).cached = Some(cached);
        self.index.insert((hash, block));
        self.as_parent(block)
    }

    /// Compares the books with `tables`, the block tables of all holders.
    pub fn check_integrity<'a>(&self, tables: impl Iterator<Item = &'a [BlockId]>) -> Result<(), Fault> {
        let mut holders = vec![0; self.blocks.len()];
        for block in tables.flatten() {
            holders[block.0 as usize] += 1;
        }
        let broken = |text: String| Err(Fault::new(FaultKind::Internal, text));
        let mut cached = 0;
        for (number, block) in self.blocks.iter().enumerate() {
            let id = BlockId(number as u32);
            if block.holders != holders[number] {
                return broken(format!(
                    "block {number} counts {} holders, {} tables have it",
                    block.holders, holders[number]
                ));
            }
            if (block.holders == 0) != self.free.contains(&(block.released, id)) {
                return broken(format!("block {number} with {} holders is in the wrong list", block.holders));
            }
            if let Some(entry) = &block.cached {
                cached += 1;
                if !self.index.contains(&(entry.hash, id)) {
                    return broken(format!("block {number} is cached but can't be found"));
                }
            }
        }
        let free = self.blocks.iter().filter(|block| block.holders == 0).count();
        if free != self.free.len() || cached != self.index.len() {
            let (listed, indexed) = (self.free.len(), self.index.len());
            return broken(format!("{free} blocks are free, {listed} listed; {cached} are cached, {indexed} indexed"));
        }
        Ok(())
    }

    /// The cached block with these tokens after this parent. The parent decides the whole prefix, so equal hashes of
    /// unequal prefixes are told apart.
    fn find(&self, parent: Parent, hash: u64, tokens: &[u32]) -> Option<BlockId> {
        let candidates = self.index.range((hash, BlockId(0))..=(hash, BlockId(u32::MAX)));
        candidates.map(|(_, block)| *block).find(|block| {
            let cached = self.at(*block).cached.as_ref();
            cached.is_some_and(|cached| cached.parent == parent && *cached.tokens == *tokens)
        })
    }

    fn as_parent(&self, block: BlockId) -> Option<Parent> {
        self.at(block).cached.as_ref().map(|cached| Parent::Cached { block, entry: cached.entry })
    }

    fn at(&self, block: BlockId) -> &Block {
        &self.blocks[block.0 as usize]
    }

    fn at_mut(&mut self, block: BlockId) -> &mut Block {
        &mut self.blocks[block.0 as usize]
    }
}
