//! Templates and conversations against what transformers renders of them (`fixtures/templates.json`).

use std::collections::BTreeMap;

use serde_json::Value;

use super::template::{ChatTemplate, Conversation};
use super::tokenizer::Named;

fn conversation(given: &Value, now: i64) -> Conversation {
    let list = |key: &str| given[key].as_array().cloned();
    Conversation {
        messages: list("messages").unwrap(),
        tools: list("tools"),
        documents: list("documents"),
        add_generation_prompt: given["add_generation_prompt"] == true,
        extra: given["extra"].as_object().cloned().unwrap_or_default(),
        now,
        ..Conversation::default()
    }
}

/// Where the renderings differ, and the number of those that are equal.
fn differences(file: &Value) -> (Vec<String>, usize) {
    let named = |(role, text): (&String, &Value)| (role.clone(), Named { id: 0, text: text.as_str().unwrap().into() });
    let names: BTreeMap<String, Named> = file["tokens"].as_object().unwrap().iter().map(named).collect();
    let (mut different, mut equal) = (Vec::new(), 0);
    for entry in file["templates"].as_array().unwrap() {
        let name = entry["name"].as_str().unwrap();
        let sources = [(String::new(), entry["template"].as_str().unwrap().to_string())].into();
        let template = match ChatTemplate::new(&sources, &names) {
            Ok(template) => template,
            Err(error) => {
                different.push(format!("{name}: {error}"));
                continue;
            }
        };
        for case in entry["cases"].as_array().unwrap() {
            let which = case["name"].as_str().unwrap();
            let given = &file["conversations"][which];
            let found = template.render(&conversation(given, file["now"].as_i64().unwrap()));
            // For a template that cannot read a list of parts they are joined; Python prints or drops the list.
            let same = match (&found, case["text"].as_str()) {
                (Ok(found), Some(wanted)) => found == wanted || which == "parts" && !template.reads_parts,
                (Err(_), None) => true,
                // What another engine cannot do is no wish of the template's.
                (Ok(_), None) => which == "parts" || !case["error"].as_str().unwrap().contains("must alternate"),
                (Err(_), Some(_)) => false,
            };
            if same {
                equal += 1;
            } else {
                different.push(format!("{name} {which}:\n  {found:?}\n  {case}"));
            }
        }
    }
    (different, equal)
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let own: Value = serde_json::from_str(include_str!("fixtures/templates.json")).unwrap();
    let (different, equal) = differences(&own);
    assert!(different.is_empty(), "{}", different.join("\n"));
    assert!(equal >= 60, "{equal}");
}

/// What the family's own template makes of these conversations.
#[test]
fn the_built_in_harmony_template_renders_as_the_familys_own() {
    let file: Value = serde_json::from_str(include_str!("fixtures/harmony.json")).unwrap();
    let sources = [(String::new(), super::harmony::TEMPLATE.to_string())].into();
    let template = ChatTemplate::new(&sources, &BTreeMap::new()).unwrap();
    for case in file["cases"].as_array().unwrap() {
        let found = template.render(&conversation(&case["conversation"], file["now"].as_i64().unwrap())).unwrap();
        assert_eq!(found, case["text"].as_str().unwrap());
    }
}

/// `CONCLAVE_TEMPLATES` names a file of the same form, with published templates that are not ours to copy.
#[test]
fn templates_of_another_file_render_so_too() {
    let Some(path) = std::env::var_os("CONCLAVE_TEMPLATES") else { return };
    let (different, equal) = differences(&serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap());
    assert!(different.is_empty(), "{equal} equal\n{}", different.join("\n"));
}
