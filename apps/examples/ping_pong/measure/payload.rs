//! Writing and reading payload in full, alike for every transport.

/// Writes every byte.
#[inline]
pub(crate) fn write(bytes: &mut [u8], seed: u8) {
    bytes.fill(seed);
    std::hint::black_box(bytes);
}

/// Reads every byte.
#[inline]
pub(crate) fn read(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    // Four sums, so that the additions do not wait for each other.
    let mut sums = [0u64; 4];
    let (fours, last) = words.as_chunks::<4>();
    for four in fours {
        for (sum, word) in sums.iter_mut().zip(four) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
        }
    }
    let words: u64 = last.iter().fold(0, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)));
    let bytes: u64 = rest.iter().fold(0, |sum, &byte| sum.wrapping_add(u64::from(byte)));
    let sum = sums.iter().fold(words.wrapping_add(bytes), |sum, &part| sum.wrapping_add(part));
    std::hint::black_box(sum)
}
