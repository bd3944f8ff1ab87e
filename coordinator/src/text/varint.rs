//! The little of Google's wire format that a sentence-piece model needs: fields of a message, one after another.

use super::error::TextError;

/// A field's value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Field<'a> {
    Number(u64),
    Float(f32),
    Bytes(&'a [u8]),
    /// Eight bytes that nothing here reads.
    Eight,
}

impl<'a> Field<'a> {
    pub fn bytes(self) -> Option<&'a [u8]> {
        if let Field::Bytes(bytes) = self { Some(bytes) } else { None }
    }

    pub fn number(self) -> Option<u64> {
        if let Field::Number(number) = self { Some(number) } else { None }
    }

    pub fn flag(self) -> Option<bool> {
        self.number().map(|number| number != 0)
    }
}

/// All fields of a message with their numbers, in order.
pub fn fields(message: &[u8]) -> Result<Vec<(u64, Field<'_>)>, TextError> {
    let mut rest = message;
    let mut fields = Vec::new();
    while !rest.is_empty() {
        let at = message.len() - rest.len();
        let field = field(&mut rest);
        fields.push(
            field.ok_or_else(|| TextError::Tokenizer(format!("no sentence-piece model: byte {at} begins no field")))?,
        );
    }
    Ok(fields)
}

fn field<'a>(rest: &mut &'a [u8]) -> Option<(u64, Field<'a>)> {
    let key = varint(rest)?;
    let value = match key & 7 {
        0 => Field::Number(varint(rest)?),
        1 => {
            rest.split_off(..8)?;
            Field::Eight
        }
        2 => {
            let length = usize::try_from(varint(rest)?).ok()?;
            Field::Bytes(rest.split_off(..length)?)
        }
        5 => Field::Float(f32::from_le_bytes(rest.split_off(..4)?.try_into().ok()?)),
        _ => return None,
    };
    Some((key >> 3, value))
}

/// Seven bits a byte, the lowest first.
fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for index in 0..10 {
        let byte = *rest.split_off_first()?;
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_field_is_read() {
        let message = [0x08, 0x96, 0x01, 0x12, 2, b'h', b'i', 0x1d, 0, 0, 0x80, 0x3f, 0x21, 1, 2, 3, 4, 5, 6, 7, 8];
        let expected = [(1, Field::Number(150)), (2, Field::Bytes(b"hi")), (3, Field::Float(1.0)), (4, Field::Eight)];
        assert_eq!(fields(&message).unwrap(), expected);
    }

    #[test]
    fn a_broken_message_is_refused_where_it_breaks() {
        for (message, at) in [(&[0x08][..], 0), (&[0x08, 1, 0x12, 9, 1], 2), (&[0x0f, 0], 0), (&[0xff; 12], 0)] {
            let error = fields(message).unwrap_err().to_string();
            assert!(error.contains(&format!("byte {at} ")), "{error}");
        }
    }
}
