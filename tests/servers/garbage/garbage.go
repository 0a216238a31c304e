// SPDX-License-Identifier: Apache-2.0

// A server that makes garbage, has it collected, and checks all that it holds: garbage PORT.
//
//	GET  /health   200
//	POST /answer   the oracle's question
//	GET  /work     allocates, frees and collects; answers with what it holds, as JSON
//
// garbage.js and Garbage.java do the same in other runtimes, and answer the same.
package main

import (
	"fmt"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
)

const (
	slots  = 64
	rounds = 400
)

var (
	lock  sync.Mutex
	held  [slots][]byte
	small map[int]string
	seed  uint32 = 1
	bad   int
)

func next(limit uint32) uint32 {
	seed = seed*1664525 + 1013904223
	return (seed >> 8) % limit
}

func work() string {
	lock.Lock()
	defer lock.Unlock()
	for i := 0; i < rounds; i++ {
		slot := next(slots)
		for at, value := range held[slot] {
			if value != byte(int(slot)+at) {
				bad++
			}
		}
		made := make([]byte, next(1<<(8+next(13))))
		for at, value := range made {
			if value != 0 {
				bad++
			}
			made[at] = byte(int(slot) + at)
		}
		held[slot] = made
		small[int(next(5000))] = fmt.Sprint("value ", i)
	}
	runtime.GC()
	debug.FreeOSMemory()
	bytes := 0
	for _, each := range held {
		bytes += len(each)
	}
	return fmt.Sprintf(`{"bytes": %d, "strings": %d, "seed": %d, "bad": %d}`, bytes, len(small), seed, bad)
}

func main() {
	small = map[int]string{}
	work()
	http.HandleFunc("/health", func(http.ResponseWriter, *http.Request) {})
	http.HandleFunc("/answer", func(to http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(to, `{"answer": "!", "asked": "?"}`)
	})
	http.HandleFunc("/work", func(to http.ResponseWriter, _ *http.Request) { fmt.Fprint(to, work()) })
	if err := http.ListenAndServe("127.0.0.1:"+os.Args[1], nil); err != nil {
		panic(err)
	}
}
