//! The exponential and the logarithm of sampling and scores. The platform's own differ by processor and library
//! version, and a token must not; these use additions, multiplications and divisions only, in one order.

const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// `e^x` within two units of the last place; 0 below -87.3 (no subnormals), infinity above 88.7.
pub fn exp(x: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    if x < -87.3 {
        return 0.0;
    }
    if x > 88.72 {
        return f32::INFINITY;
    }
    // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, the first short enough for n times it to be exact.
    let n = (x * std::f32::consts::LOG2_E).round();
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    // The Taylor series to the sixth power leaves less than 2e-8 on that interval.
    let mut series = 1.0 / 720.0;
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = series * r + c;
    }
    // Two factors, because 2^128 by itself is infinite.
    let half = n as i32 / 2;
    let power = |k: i32| f32::from_bits(((k + 127) as u32) << 23);
    series * power(half) * power(n as i32 - half)
}

/// `ln x` of a positive finite number, within a few units of the last place of f64.
pub fn ln(x: f64) -> f64 {
    assert!(x > 0.0 && x.is_normal(), "ln({x})");
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut m = f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52);
    if m > std::f64::consts::SQRT_2 {
        m /= 2.0;
        exponent += 1;
    }
    // ln m = 2 artanh s; s^2 < 0.03, so twelve terms pass f64's precision.
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let mut series = 0.0;
    for k in (0..12).rev() {
        series = series * square + 1.0 / f64::from(2 * k + 1);
    }
    2.0 * s * series + exponent as f64 * std::f64::consts::LN_2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_agrees_with_f64() {
        let mut x = -87.0f32;
        while x < 88.0 {
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found / expected - 1.0).abs() < 2.5e-7, "exp({x}) = {found}, not {expected}");
            x += 0.0137;
        }
        assert_eq!((exp(0.0), exp(-200.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
    }

    #[test]
    fn the_logarithm_agrees_with_f64() {
        for k in -300..300 {
            let x = 1.37f64.powi(k) * 1.001;
            assert!((ln(x) - x.ln()).abs() <= 1e-14 * x.ln().abs().max(1.0), "ln({x})");
        }
        assert_eq!(ln(1.0), 0.0);
    }
}
