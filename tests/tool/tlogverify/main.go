// Command tlogverify checks a trainguard log with the Go project's own transparency log packages,
// golang.org/x/mod/sumdb/note and tlog, which share no code with trainguard.
//
//	tlogverify VKEY LOGDIR [OLDSIZE OLDROOT]...
//
// It verifies the signed tree head in LOGDIR/checkpoint, authenticates every tile against its root, hashes every entry
// of every bundle and compares it with its leaf, proves and checks inclusion of every 97th entry, and checks that the
// tree extends each older one given as size and hexadecimal root. It prints the size and exits 0, or says what is wrong
// and exits 1.
package main

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const tileHeight = 8

// files reads tiles by the C2SP tlog-tiles names, which differ from the checksum database's in their first elements.
type files struct{ dir string }

func (f files) Height() int { return tileHeight }

func (f files) SaveTiles([]tlog.Tile, [][]byte) {}

func (f files) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	var all [][]byte
	for _, tile := range tiles {
		data, err := os.ReadFile(filepath.Join(f.dir, tilePath(tile)))
		if err != nil {
			return nil, err
		}
		all = append(all, data)
	}
	return all, nil
}

// tilePath turns tile/8/0/001.p/5 into tile/0/001.p/5.
func tilePath(tile tlog.Tile) string {
	return strings.Replace(tile.Path(), "tile/8/", "tile/", 1)
}

// bundlePath is the name of the entry bundle that belongs to a level-0 tile.
func bundlePath(tile tlog.Tile) string {
	return strings.Replace(tilePath(tile), "tile/0/", "tile/entries/", 1)
}

type head struct {
	size int64
	root tlog.Hash
}

func main() {
	size, err := verify(os.Args[1], os.Args[2], os.Args[3:])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(size)
}

func verify(vkey, dir string, older []string) (int64, error) {
	current, err := readHead(vkey, filepath.Join(dir, "checkpoint"))
	if err != nil {
		return 0, fmt.Errorf("checkpoint: %w", err)
	}
	if current.size == 0 {
		return 0, nil
	}
	hashes := tlog.TileHashReader(tlog.Tree{N: current.size, Hash: current.root}, files{dir})
	root, err := tlog.TreeHash(current.size, hashes)
	if err != nil {
		return 0, err
	}
	if root != current.root {
		return 0, errors.New("tiles do not have the signed root")
	}
	if err := checkEntries(dir, current, hashes); err != nil {
		return 0, err
	}
	if err := checkInclusion(current, hashes); err != nil {
		return 0, err
	}
	return current.size, checkOlder(current, hashes, older)
}

func readHead(vkey, path string) (head, error) {
	verifier, err := note.NewVerifier(vkey)
	if err != nil {
		return head{}, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return head{}, err
	}
	opened, err := note.Open(data, note.VerifierList(verifier))
	if err != nil {
		return head{}, err
	}
	lines := strings.Split(opened.Text, "\n")
	if len(lines) < 4 || lines[0] != verifier.Name() {
		return head{}, errors.New("not a tree head of this log")
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil {
		return head{}, err
	}
	root, err := base64.StdEncoding.DecodeString(lines[2])
	if err != nil || len(root) != tlog.HashSize {
		return head{}, errors.New("bad root hash")
	}
	result := head{size: size}
	copy(result.root[:], root)
	return result, nil
}

func checkEntries(dir string, current head, hashes tlog.HashReader) error {
	for first := int64(0); first < current.size; first += 1 << tileHeight {
		width := min(current.size-first, 1<<tileHeight)
		tile := tlog.Tile{H: tileHeight, L: 0, N: first >> tileHeight, W: int(width)}
		data, err := os.ReadFile(filepath.Join(dir, bundlePath(tile)))
		if err != nil {
			return err
		}
		var indexes []int64
		for i := first; i < first+width; i++ {
			indexes = append(indexes, tlog.StoredHashIndex(0, i))
		}
		leaves, err := hashes.ReadHashes(indexes)
		if err != nil {
			return err
		}
		for i, leaf := range leaves {
			if len(data) < 2 || len(data)-2 < int(binary.BigEndian.Uint16(data)) {
				return fmt.Errorf("%s: cut short", bundlePath(tile))
			}
			length := int(binary.BigEndian.Uint16(data))
			if tlog.RecordHash(data[2:2+length]) != leaf {
				return fmt.Errorf("entry %d is not the one in the tree", first+int64(i))
			}
			data = data[2+length:]
		}
		if !bytes.Equal(data, nil) {
			return fmt.Errorf("%s: bytes after the last entry", bundlePath(tile))
		}
	}
	return nil
}

func checkInclusion(current head, hashes tlog.HashReader) error {
	for index := int64(0); index < current.size; index += 97 {
		proof, err := tlog.ProveRecord(current.size, index, hashes)
		if err != nil {
			return err
		}
		leaf, err := hashes.ReadHashes([]int64{tlog.StoredHashIndex(0, index)})
		if err != nil {
			return err
		}
		if err := tlog.CheckRecord(proof, current.size, current.root, index, leaf[0]); err != nil {
			return fmt.Errorf("entry %d: %w", index, err)
		}
	}
	return nil
}

func checkOlder(current head, hashes tlog.HashReader, older []string) error {
	for ; len(older) >= 2; older = older[2:] {
		size, err := strconv.ParseInt(older[0], 10, 64)
		if err != nil {
			return err
		}
		data, err := hex.DecodeString(older[1])
		if err != nil || len(data) != tlog.HashSize {
			return errors.New("bad older root")
		}
		var root tlog.Hash
		copy(root[:], data)
		if size == 0 {
			continue
		}
		proof, err := tlog.ProveTree(current.size, size, hashes)
		if err != nil {
			return err
		}
		if err := tlog.CheckTree(proof, current.size, current.root, size, root); err != nil {
			return fmt.Errorf("does not extend size %d: %w", size, err)
		}
	}
	return nil
}

func min(a, b int64) int64 {
	if a < b {
		return a
	}
	return b
}
