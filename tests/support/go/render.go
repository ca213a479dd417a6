// Renders Go templates as Ollama does: standard input holds one {"template", "messages"} a line, standard output
// gets one {"text"} or {"error"} for each.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
	"time"
)

type request struct {
	Template string    `json:"template"`
	Messages []message `json:"messages"`
}

type message struct {
	Role     string `json:"role"`
	Content  string `json:"content"`
	Thinking string `json:"-"`
	ToolName string `json:"-"`
}

type answer struct {
	Text  string `json:"text"`
	Error string `json:"error,omitempty"`
}

var functions = template.FuncMap{
	"json": func(value any) string {
		text, _ := json.Marshal(value)
		return string(text)
	},
	"currentDate":      func(...string) string { return time.Now().Format(time.DateOnly) },
	"yesterdayDate":    func(...string) string { return time.Now().AddDate(0, 0, -1).Format(time.DateOnly) },
	"toTypeScriptType": func(any) string { return "any" },
}

// together joins neighbours of one role by an empty line, and the texts of all system messages likewise.
func together(messages []message) (string, []message) {
	var system []string
	var joined []message
	for _, next := range messages {
		if next.Role == "system" {
			system = append(system, next.Content)
		}
		last := len(joined) - 1
		if last >= 0 && joined[last].Role == next.Role && next.Role != "tool" {
			joined[last].Content += "\n\n" + next.Content
			continue
		}
		joined = append(joined, next)
	}
	return strings.Join(system, "\n\n"), joined
}

func render(asked request) (string, error) {
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(asked.Template)
	if err != nil {
		return "", err
	}
	system, messages := together(asked.Messages)
	var text strings.Builder
	err = parsed.Execute(&text, map[string]any{
		"System":     system,
		"Messages":   messages,
		"Tools":      nil,
		"Response":   "",
		"Think":      false,
		"ThinkLevel": "",
		"IsThinkSet": false,
	})
	return text.String(), err
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<26)
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	for lines.Scan() {
		var asked request
		var reply answer
		err := json.Unmarshal(lines.Bytes(), &asked)
		if err == nil {
			reply.Text, err = render(asked)
		}
		if err != nil {
			reply.Error = err.Error()
		}
		line, _ := json.Marshal(reply)
		fmt.Fprintln(out, string(line))
	}
	if err := lines.Err(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
