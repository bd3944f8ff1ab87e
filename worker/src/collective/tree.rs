//! The balanced binary tree of additions over ranks: the one place that fixes a sum's order.

/// Numbers added before moving on: two tiles of scratch stay in the first-level cache.
const TILE: usize = 1024;

/// `out[i]` becomes the balanced tree over `sources[..][i]`. All lengths are equal; the number of sources is a power
/// of two.
pub fn add(sources: &[&[f32]], out: &mut [f32]) {
    assert!(sources.len().is_power_of_two(), "a balanced tree over {} sources", sources.len());
    assert!(sources.iter().all(|source| source.len() == out.len()));
    match sources {
        [a] => out.copy_from_slice(a),
        [a, b] => {
            for ((out, a), b) in out.iter_mut().zip(*a).zip(*b) {
                *out = a + b;
            }
        }
        [a, b, c, d] => {
            for ((((out, a), b), c), d) in out.iter_mut().zip(*a).zip(*b).zip(*c).zip(*d) {
                *out = (a + b) + (c + d);
            }
        }
        // Eight ranks of a host are common enough to do without lists of tiles.
        [a, b, c, d, e, f, g, h] => {
            let (low, high) = (a.iter().zip(*b).zip(c.iter().zip(*d)), e.iter().zip(*f).zip(g.iter().zip(*h)));
            for ((out, ((a, b), (c, d))), ((e, f), (g, h))) in out.iter_mut().zip(low).zip(high) {
                *out = ((a + b) + (c + d)) + ((e + f) + (g + h));
            }
        }
        _ => add_halves(sources, out),
    }
}

fn add_halves(sources: &[&[f32]], out: &mut [f32]) {
    let (left, right) = sources.split_at(sources.len() / 2);
    let mut scratch = [0f32; TILE];
    for (tile, out) in out.chunks_mut(TILE).enumerate() {
        let range = tile * TILE..tile * TILE + out.len();
        let scratch = &mut scratch[..out.len()];
        add(&cut(left, &range), out);
        add(&cut(right, &range), scratch);
        join(out, scratch);
    }
}

fn cut<'a>(sources: &[&'a [f32]], range: &std::ops::Range<usize>) -> Vec<&'a [f32]> {
    sources.iter().map(|source| &source[range.clone()]).collect()
}

/// `left + right`, into `left`: one inner node of the tree.
pub fn join(left: &mut [f32], right: &[f32]) {
    assert_eq!(left.len(), right.len());
    for (left, right) in left.iter_mut().zip(right) {
        *left += right;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_added_before_distant_ranks() {
        // 1e8 + 1 rounds to 1e8: only the balanced order keeps the small pairs' sums.
        for values in
            [[1e8f32, -1e8, 1.0, 1.0, 3.0, 1e8, -1e8, 0.5].to_vec(), (0..16).map(|i| 1.1 / (i as f32 + 0.7)).collect()]
        {
            let expected = balanced(&values);
            let sources: Vec<Vec<f32>> = values.iter().map(|v| vec![*v; 2500]).collect();
            let sources: Vec<&[f32]> = sources.iter().map(Vec::as_slice).collect();
            let mut out = vec![0.0; 2500];
            add(&sources, &mut out);
            assert!(out.iter().all(|v| v.to_bits() == expected.to_bits()));
            assert_ne!(expected, values.iter().sum::<f32>(), "the example must tell the orders apart");
        }
    }

    fn balanced(values: &[f32]) -> f32 {
        match values {
            [one] => *one,
            _ => balanced(&values[..values.len() / 2]) + balanced(&values[values.len() / 2..]),
        }
    }
}
