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

#[cfg(test)]
mod tests {
    use super::*;

    fn collide(_: u64, _: &[u32]) -> u64 {
        7
    }

    fn hashes(hash: BlockHash, salt: u64, tokens: &[u32]) -> Vec<u64> {
        let mut parent = hash(salt, &[]);
        let chain = tokens.chunks_exact(BLOCK_TOKENS).map(|tokens| {
            parent = hash(parent, tokens);
            parent
        });
        chain.collect()
    }

    fn find(pool: &BlockPool, hash: BlockHash, salt: u64, tokens: &[u32]) -> Vec<BlockId> {
        pool.longest_prefix(salt, &hashes(hash, salt, tokens), tokens).0
    }

    /// Computes and releases all full blocks of `tokens`.
    fn cache(pool: &mut BlockPool, hash: BlockHash, salt: u64, tokens: &[u32]) -> Vec<BlockId> {
        let mut parent = Some(Parent::Root { salt });
        let mut table = Vec::new();
        for (hash, tokens) in hashes(hash, salt, tokens).into_iter().zip(tokens.chunks_exact(BLOCK_TOKENS)) {
            let block = pool.allocate().unwrap();
            parent = parent.and_then(|parent| pool.register(block, parent, hash, tokens));
            table.push(block);
            pool.check_integrity([table.as_slice()].into_iter()).unwrap();
        }
        for block in table.iter().rev() {
            pool.release(*block);
        }
        pool.check_integrity(std::iter::empty()).unwrap();
        table
    }

    fn prompt(first: u32, blocks: usize) -> Vec<u32> {
        (0..(blocks * BLOCK_TOKENS) as u32).map(|position| if position == 0 { first } else { position }).collect()
    }

    #[test]
    fn a_released_prefix_is_found_again() {
        for hash in [chained_hash as BlockHash, collide] {
            let mut pool = BlockPool::new(8);
            let table = cache(&mut pool, hash, 1, &prompt(9, 3));
            assert_eq!(pool.available(), 8);
            assert_eq!(find(&pool, hash, 1, &prompt(9, 4)), table);
            assert_eq!(find(&pool, hash, 1, &prompt(9, 2)), table[..2]);
        }
    }

    #[test]
    fn a_collision_or_another_tenant_finds_nothing() {
        for hash in [chained_hash as BlockHash, collide] {
            let mut pool = BlockPool::new(8);
            let table = cache(&mut pool, hash, 1, &prompt(9, 3));
            // Blocks 2 and 3 are equal, what stands before them is not.
            assert_eq!(find(&pool, hash, 1, &prompt(8, 3)), []);
            assert_eq!(find(&pool, hash, 2, &prompt(9, 3)), []);
            let mut other_tail = prompt(9, 3);
            other_tail[2 * BLOCK_TOKENS] += 1;
            assert_eq!(find(&pool, hash, 1, &other_tail), table[..2]);
        }
    }

    #[test]
    fn a_freed_block_is_reused_last_and_a_tail_before_its_head() {
        let mut pool = BlockPool::new(6);
        let old = cache(&mut pool, chained_hash, 0, &prompt(1, 2));
        let new = cache(&mut pool, chained_hash, 0, &prompt(2, 2));
        let order: Vec<BlockId> = (0..6).map(|_| pool.allocate().unwrap()).collect();
        assert_eq!(order[2..], [old[1], old[0], new[1], new[0]]);
        assert_eq!(pool.allocate(), None);
        assert_eq!(find(&pool, chained_hash, 0, &prompt(1, 2)), []);
        pool.check_integrity([order.as_slice()].into_iter()).unwrap();
    }

    #[test]
    fn a_shared_block_is_free_after_its_last_holder() {
        let mut pool = BlockPool::new(1);
        let block = cache(&mut pool, chained_hash, 0, &prompt(1, 1))[0];
        pool.share(block);
        pool.share(block);
        assert_eq!((pool.used(), pool.allocate()), (1, None));
        pool.check_integrity([[block].as_slice(), &[block]].into_iter()).unwrap();
        pool.release(block);
        assert_eq!(pool.allocate(), None);
        pool.release(block);
        assert_eq!(pool.allocate(), Some(block));
    }

    #[test]
    fn a_child_of_an_evicted_parent_is_not_cached() {
        let mut pool = BlockPool::new(2);
        let tokens = prompt(1, 2);
        let chain = hashes(chained_hash, 0, &tokens);
        let head = pool.allocate().unwrap();
        let parent = pool.register(head, Parent::Root { salt: 0 }, chain[0], &tokens[..BLOCK_TOKENS]).unwrap();
        pool.release(head);
        let (first, second) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        assert_eq!(second, head, "the cached block is evicted last");
        assert_eq!(pool.register(first, parent, chain[1], &tokens[BLOCK_TOKENS..]), None);
    }

    #[test]
    fn a_block_computed_twice_is_cached_once() {
        let mut pool = BlockPool::new(2);
        let tokens = prompt(1, 1);
        let hash = hashes(chained_hash, 0, &tokens)[0];
        let (first, second) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        let parent = pool.register(first, Parent::Root { salt: 0 }, hash, &tokens);
        assert_eq!(pool.register(second, Parent::Root { salt: 0 }, hash, &tokens), parent);
        pool.release(second);
        assert_eq!(pool.allocate(), Some(second));
        assert_eq!(find(&pool, chained_hash, 0, &tokens), [first]);
    }

    #[test]
    fn wrong_books_are_noticed() {
        let mut pool = BlockPool::new(2);
        let block = pool.allocate().unwrap();
        assert!(pool.check_integrity(std::iter::empty()).is_err());
        assert!(pool.check_integrity([[block, block].as_slice()].into_iter()).is_err());
        pool.check_integrity([[block].as_slice()].into_iter()).unwrap();
    }
}
