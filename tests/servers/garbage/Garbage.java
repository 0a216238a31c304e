// SPDX-License-Identifier: Apache-2.0
// Does in Java what garbage.go does in Go: java Garbage PORT

import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.util.HashMap;
import java.util.Map;

public class Garbage {
  static final int SLOTS = 64, ROUNDS = 400;
  static final byte[][] held = new byte[SLOTS][0];
  static final Map<Integer, String> small = new HashMap<>();
  static int seed = 1, bad = 0;

  static int next(int limit) {
    seed = seed * 1664525 + 1013904223;
    return (seed >>> 8) % limit;
  }

  static synchronized String work() {
    for (int i = 0; i < ROUNDS; i++) {
      int slot = next(SLOTS);
      byte[] old = held[slot];
      for (int at = 0; at < old.length; at++) if (old[at] != (byte) (slot + at)) bad++;
      byte[] made = new byte[next(1 << (8 + next(13)))];
      for (int at = 0; at < made.length; at++) {
        if (made[at] != 0) bad++;
        made[at] = (byte) (slot + at);
      }
      held[slot] = made;
      small.put(next(5000), "value " + i);
    }
    System.gc();
    int bytes = 0;
    for (byte[] each : held) bytes += each.length;
    return String.format(
        "{\"bytes\": %d, \"strings\": %d, \"seed\": %s, \"bad\": %d}",
        bytes, small.size(), Integer.toUnsignedString(seed), bad);
  }

  static void answer(HttpExchange exchange, String text) throws IOException {
    byte[] body = text.getBytes();
    exchange.sendResponseHeaders(200, body.length == 0 ? -1 : body.length);
    exchange.getResponseBody().write(body);
    exchange.close();
  }

  public static void main(String[] words) throws Exception {
    work();
    HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", Integer.parseInt(words[0])), 50);
    server.createContext("/health", exchange -> answer(exchange, ""));
    server.createContext("/answer", exchange -> answer(exchange, "{\"answer\": \"!\", \"asked\": \"?\"}"));
    server.createContext("/work", exchange -> answer(exchange, work()));
    server.start();
  }
}
